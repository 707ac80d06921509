#include <algorithm>
#include <filesystem>
#include <stdexcept>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/mapped_file.h"
#include "tests/support/test_data.h"
#include "train/machine.h"

namespace rwkv {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::StartsWith;

// Files of /proc and /sys as a machine has them, below a folder.
class FakeMachine : public testing::Test {
 protected:
  void SetUp() override {
    put("proc/cpuinfo",
        "processor\t: 0\nmodel\t\t: 143\nmodel name\t: Fast 9000 @ 2 GHz\n"
        "flags\t\t: fpu avx2 avx512_bf16 avx512f\n\nprocessor\t: 1\nmodel name\t: Other\n");
    put("proc/meminfo", "MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n");
  }
  void put(const std::string& name, const std::string& text) {
    std::filesystem::create_directories(std::filesystem::path(folder_.path(name)).parent_path());
    test::write_file(folder_.path(name), text);
  }
  Machine describe() const { return describe_machine(folder_.path()); }

  test::TempFolder folder_;
};

TEST_F(FakeMachine, IsReadFromProc) {
  const Machine machine = describe();
  EXPECT_EQ(machine.processor, "Fast 9000 @ 2 GHz");
  EXPECT_EQ(machine.memory_bytes, 16000000LL * 1024);
  EXPECT_THAT(machine.features, ElementsAre("avx2", "avx512", "avx512_bf16"));
  EXPECT_TRUE(machine.has("avx512"));
  EXPECT_FALSE(machine.has("amx_bf16"));
  EXPECT_EQ(machine.cpu_quota, std::nullopt);
  EXPECT_EQ(available_memory_bytes(folder_.path()), 8000000LL * 1024);
}

TEST_F(FakeMachine, HasTheLeastOfTheLimitsOfItsGroups) {
  put("proc/self/cgroup", "0::/user.slice/job\n");
  put("sys/fs/cgroup/user.slice/memory.max", "4294967296\n");
  put("sys/fs/cgroup/user.slice/cpu.max", "150000 100000\n");
  put("sys/fs/cgroup/user.slice/job/memory.max", "8589934592\n");
  put("sys/fs/cgroup/user.slice/job/cpu.max", "max 100000\n");
  EXPECT_EQ(describe().memory_bytes, 4294967296);
  EXPECT_EQ(describe().cpu_quota, 1.5);
}

TEST_F(FakeMachine, OfAContainerHasTheLimitsOfTheRoot) {
  put("proc/self/cgroup", "0::/../not/here\n");
  put("sys/fs/cgroup/memory.max", "1000000000\n");
  EXPECT_EQ(describe().memory_bytes, 1000000000);
}

TEST_F(FakeMachine, HasWhatItsGroupsLeaveFree) {
  put("proc/self/cgroup", "0::/a/job\n");
  put("sys/fs/cgroup/a/memory.max", "4000000000\n");
  put("sys/fs/cgroup/a/memory.current", "3000000000\n");
  // Some of it is the pages of files, which give way.
  put("sys/fs/cgroup/a/memory.stat", "anon 2000000000\ninactive_file 600000000\n");
  EXPECT_EQ(available_memory_bytes(folder_.path()), 1600000000);
  put("sys/fs/cgroup/a/job/memory.max", "max\n");
  put("sys/fs/cgroup/a/job/memory.current", "2900000000\n");
  EXPECT_EQ(available_memory_bytes(folder_.path()), 1600000000);
  put("sys/fs/cgroup/a/job/memory.max", "2800000000\n");
  EXPECT_EQ(available_memory_bytes(folder_.path()), 0);
}

TEST_F(FakeMachine, HasTheLimitsOfGroupsOfTheOlderVersion) {
  put("proc/self/cgroup", "4:memory:/slurm/job\n3:cpuset:/\n1:cpu,cpuacct:/slurm/job\n0::/\n");
  put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  put("sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes", "4000000000\n");
  put("sys/fs/cgroup/memory/slurm/job/memory.usage_in_bytes", "3000000000\n");
  put("sys/fs/cgroup/memory/slurm/job/memory.stat",
      "inactive_file 1\ntotal_inactive_file 200000000\n");
  put("sys/fs/cgroup/cpu/slurm/cpu.cfs_quota_us", "-1\n");
  put("sys/fs/cgroup/cpu/slurm/cpu.cfs_period_us", "100000\n");
  put("sys/fs/cgroup/cpu/slurm/job/cpu.cfs_quota_us", "50000\n");
  put("sys/fs/cgroup/cpu/slurm/job/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(describe().memory_bytes, 4000000000);
  EXPECT_EQ(available_memory_bytes(folder_.path()), 1200000000);
  EXPECT_EQ(describe().cpu_quota, 0.5);
}

TEST_F(FakeMachine, HasWhatTheLimitOfAddressSpaceLeaves) {
  put("proc/self/status", "Name:\trookery\nVmSize:\t  500000 kB\n");
  put("proc/self/limits",
      "Limit                     Soft Limit           Hard Limit           Units     \n"
      "Max resident set          1                    unlimited            bytes     \n"
      "Max address space         1500000000           unlimited            bytes     \n");
  EXPECT_EQ(available_memory_bytes(folder_.path()), 1500000000 - 500000 * 1024);
  put("proc/self/limits", "Max address space         unlimited            unlimited    bytes\n");
  EXPECT_EQ(available_memory_bytes(folder_.path()), 8000000LL * 1024);
}

TEST_F(FakeMachine, WithoutALimitHasItsMemory) {
  put("sys/fs/cgroup/memory.max", "max\n");
  // What the older kind of group says where there is no limit.
  put("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(describe().memory_bytes, 16000000LL * 1024);
}

TEST(Machine, WithoutProcIsUnknown) {
  const test::TempFolder folder;
  const Machine machine = describe_machine(folder.path());
  EXPECT_EQ(machine.processor, "unknown processor");
  EXPECT_THAT(machine.features, IsEmpty());
  EXPECT_EQ(machine.memory_bytes, 0);
}

TEST(Machine, OfThisTestIsKnown) {
  const Machine machine = describe_machine();
  EXPECT_GE(machine.cores, 1);
  EXPECT_GT(machine.memory_bytes, int64_t{1} << 27);
  EXPECT_THAT(machine.system, StartsWith("Linux "));
}

TEST(PeakResident, GrowsByWhatIsTouched) {
  constexpr size_t kBytes = size_t{64} << 20;
  const int64_t before = peak_resident_bytes();
  const std::vector<char> touched(kBytes, 1);
  EXPECT_GT(peak_resident_bytes(), static_cast<int64_t>(kBytes));
  EXPECT_GE(peak_resident_bytes() + (int64_t{16} << 20), before + touched.back());
  EXPECT_LT(peak_resident_bytes(), int64_t{4} << 30);
}

TEST(PeakAnonymous, GrowsByWhatIsTouchedButNotByTheCodeOfFiles) {
  constexpr size_t kBytes = size_t{64} << 20;
  const test::TempFolder folder;
  test::write_file(folder.path("f"), std::string(kBytes, 'x'));
  // Forgets the peak: tests of this program that ran before may have been larger.
  test::write_file("/proc/self/clear_refs", "5");
  const int64_t before = anonymous_bytes();
  const int64_t resident_before = peak_resident_bytes();
  const MappedFile file(folder.path("f"));
  EXPECT_EQ(std::ranges::count(file.bytes(), std::byte{'x'}), std::ssize(file.bytes()));
  EXPECT_LT(anonymous_bytes() - before, int64_t{8} << 20);
  const std::vector<char> touched(kBytes, 1);
  const int64_t peak = peak_anonymous_bytes();
  EXPECT_GE(anonymous_bytes() - before, std::ssize(touched));
  EXPECT_NEAR(static_cast<double>(peak - before),
              static_cast<double>(std::ssize(touched)),
              static_cast<double>(8 << 20));
  EXPECT_GT(peak_resident_bytes() - resident_before, std::ssize(touched) + (int64_t{56} << 20));
}

TEST(FreeDisk, IsThatOfTheFolderAboveOneThatIsNotThere) {
  const test::TempFolder folder;
  EXPECT_GT(free_disk_bytes(folder.path("not/there/yet")), 0);
}

}  // namespace
}  // namespace rwkv
