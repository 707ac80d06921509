#include <filesystem>
#include <stdexcept>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

TEST(FreeDisk, IsThatOfTheFolderAboveOneThatIsNotThere) {
  const test::TempFolder folder;
  EXPECT_GT(free_disk_bytes(folder.path("not/there/yet")), 0);
}

}  // namespace
}  // namespace rwkv
