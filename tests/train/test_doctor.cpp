#include <algorithm>
#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/test_data.h"
#include "train/doctor.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

constexpr int64_t kGib = int64_t{1} << 30;

// A machine on which all is well.
HealthFacts healthy() {
  return {
      .machine = {.processor = "P",
                  .cores = 8,
                  .cpu_quota = {},
                  .memory_bytes = 64 * kGib,
                  .features = {"avx2", "avx512", "avx512_bf16", "amx_bf16"},
                  .system = "Linux"},
      .available_memory_bytes = 60 * kGib,
      .libtorch = {.version = "2.11.0", .path = "/lib/libtorch_cpu.so", .error = ""},
      .gpu = {.kernel_driver = "", .devices = {}},
      .disk = {.folder = "/work", .free_bytes = 100 * kGib, .write_bytes_per_s = 1e9, .error = ""},
      .vocabulary = "/share/vocab.txt",
      .huge_pages = "madvise",
      .open_files_limit = 1024,
      .file_size_limit = {}};
}

Check check_of(const HealthFacts& facts, const std::string& name) {
  const auto checks = examine(facts);
  const auto found = std::ranges::find(checks, name, &Check::name);
  return found == checks.end() ? Check{} : *found;
}

TEST(Doctor, HasNoAdviceForAHealthyMachine) {
  const auto checks = examine(healthy());
  for (const Check& check : checks) {
    EXPECT_EQ(check.verdict, Verdict::kGood) << check.name;
    EXPECT_THAT(check.advice, IsEmpty()) << check.name;
  }
  EXPECT_TRUE(can_train(checks));
  EXPECT_THAT(checks_as_text(checks),
              AllOf(HasSubstr("training can run here"), Not(HasSubstr("->"))));
}

TEST(Doctor, SaysThatBf16WillBeSlow) {
  HealthFacts facts = healthy();
  facts.machine.features = {"avx2", "avx512"};
  EXPECT_THAT(check_of(facts, "bf16").advice, HasSubstr("leave train.dtype at \"fp32\""));
  EXPECT_EQ(check_of(facts, "processor").verdict, Verdict::kGood);
  facts.machine.features = {};
  EXPECT_EQ(check_of(facts, "processor").verdict, Verdict::kWarning);
  EXPECT_TRUE(can_train(examine(facts)));
}

TEST(Doctor, CountsTheCoresOfAContainer) {
  HealthFacts facts = healthy();
  facts.machine.cpu_quota = 2.5;
  EXPECT_THAT(check_of(facts, "cores").advice, HasSubstr("train.threads = 2"));
  facts.machine.cpu_quota = 0.5;
  EXPECT_THAT(check_of(facts, "cores").advice, HasSubstr("train.threads = 1"));
  facts.machine.cpu_quota = 8;
  EXPECT_EQ(check_of(facts, "cores").verdict, Verdict::kGood);
}

TEST(Doctor, CannotTrainWithoutLibTorchOrMemory) {
  HealthFacts facts = healthy();
  facts.libtorch = {.version = "", .path = "", .error = "librookery_torch.so: not there"};
  EXPECT_EQ(check_of(facts, "libtorch").found, "librookery_torch.so: not there");
  EXPECT_FALSE(can_train(examine(facts)));
  EXPECT_THAT(checks_as_text(examine(facts)), HasSubstr("training cannot run here"));
  facts = healthy();
  facts.available_memory_bytes = kGib / 4;
  EXPECT_FALSE(can_train(examine(facts)));
  facts.available_memory_bytes = kGib;
  EXPECT_EQ(check_of(facts, "memory").verdict, Verdict::kWarning);
  EXPECT_TRUE(can_train(examine(facts)));
}

TEST(Doctor, JudgesTheDisk) {
  HealthFacts facts = healthy();
  facts.disk.write_bytes_per_s = 1e6;
  EXPECT_THAT(check_of(facts, "disk").advice, HasSubstr("slow"));
  facts.disk.free_bytes = kGib;
  EXPECT_THAT(check_of(facts, "disk").advice, HasSubstr("little"));
  facts.disk.write_bytes_per_s.reset();
  facts.disk.error = "Read-only file system";
  EXPECT_THAT(check_of(facts, "disk").found, HasSubstr("Read-only file system"));
  EXPECT_THAT(check_of(facts, "disk").advice, HasSubstr("train.run_dir to a folder"));
  facts.disk.is_full = true;
  EXPECT_THAT(check_of(facts, "disk").advice, HasSubstr("free some space"));
}

TEST(Doctor, HasAnAdviceForEverySmallThing) {
  HealthFacts facts = healthy();
  facts.vocabulary = "";
  facts.huge_pages = "never";
  facts.open_files_limit = 64;
  facts.gpu.devices = {{.name = "A GPU", .capability_major = 9}};
  facts.gpu.has_library = true;
  facts.gpu.cuda_version = 12040;
  EXPECT_THAT(check_of(facts, "vocabulary").advice, HasSubstr("scripts/setup.sh"));
  EXPECT_THAT(check_of(facts, "huge pages").advice, HasSubstr("madvise"));
  EXPECT_THAT(check_of(facts, "limits").advice, HasSubstr("ulimit -n"));
  EXPECT_THAT(check_of(facts, "gpu").found, HasSubstr("A GPU (compute capability 9.0"));
  EXPECT_THAT(check_of(facts, "gpu").advice, HasSubstr("for CUDA 12.4, expected 13.0"));
  facts.file_size_limit = kGib;
  EXPECT_THAT(check_of(facts, "limits").advice, HasSubstr("ulimit -f"));
}

TEST(Doctor, MeasuresTheDiskAndLeavesNothingThere) {
  const test::TempFolder folder;
  const HealthFacts facts = find_facts(folder.path());
  ASSERT_TRUE(facts.disk.write_bytes_per_s) << facts.disk.error;
  EXPECT_GT(*facts.disk.write_bytes_per_s, 0);
  EXPECT_GT(facts.disk.free_bytes.value_or(0), 0);
  EXPECT_THAT(folder.files(), IsEmpty());
  EXPECT_GT(facts.open_files_limit, 0);
}

TEST(Doctor, SaysWhyAFolderCannotBeWritten) {
  const test::TempFolder folder;
  const HealthFacts facts = find_facts(folder.path("none"));
  EXPECT_EQ(facts.disk.error, "No such file or directory");
}

TEST(LoadedLibrary, IsFoundByItsName) {
  EXPECT_THAT(loaded_library("libstdc++.so"), HasSubstr("/libstdc++.so"));
  EXPECT_EQ(loaded_library("libnone.so"), "");
}

}  // namespace
}  // namespace rwkv
