// What is said of a GPU that cannot be used: one sentence with what to do.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "train/gpu.h"

namespace rwkv {
namespace {

using testing::HasSubstr;

GpuFacts one_h100() {
  return {.kernel_driver = "NVRM version",
          .has_library = true,
          .cuda_version = 13000,
          .devices = {{.name = "NVIDIA H100", .capability_major = 9, .capability_minor = 0}}};
}

TEST(WhyNotUsable, IsNothingForAGpuOfThisDecade) {
  EXPECT_EQ(why_not_usable(one_h100(), 0), "");
}

TEST(WhyNotUsable, NamesAMissingDriver) {
  EXPECT_THAT(why_not_usable({}, 0), HasSubstr("no NVIDIA driver is installed here"));
}

TEST(WhyNotUsable, NamesAnOldDriverAndWhatIsNeeded) {
  GpuFacts gpu = one_h100();
  gpu.cuda_version = 12040;
  EXPECT_THAT(why_not_usable(gpu, 0), HasSubstr("is for CUDA 12.4, expected 13.0 or newer"));
}

TEST(WhyNotUsable, SaysWhatTheDriverSaid) {
  GpuFacts gpu = one_h100();
  gpu.devices.clear();
  EXPECT_THAT(why_not_usable(gpu, 0), HasSubstr("finds no GPU; is one there"));
  gpu.error = "CUDA_ERROR_NO_DEVICE";
  EXPECT_THAT(why_not_usable(gpu, 0), HasSubstr("finds no GPU (CUDA_ERROR_NO_DEVICE)"));
}

TEST(WhyNotUsable, NamesTheGpusThereAre) {
  EXPECT_THAT(why_not_usable(one_h100(), 2), HasSubstr("there is no GPU 2, only 0 to 0"));
}

TEST(WhyNotUsable, NamesAnOldGpu) {
  GpuFacts gpu = one_h100();
  gpu.devices[0] = {.name = "NVIDIA V100", .capability_major = 7, .capability_minor = 0};
  EXPECT_THAT(why_not_usable(gpu, 0),
              HasSubstr("GPU 0, NVIDIA V100, has compute capability 7.0, expected 8.0"));
}

TEST(WhyNoKernels, IsNothingForWhatAGpuTrains) {
  EXPECT_EQ(why_no_kernels({.version = "rwkv4"}), "");
  for (const int64_t head_size : kCudaHeadSizes) {
    EXPECT_EQ(why_no_kernels({.version = "rwkv7", .head_size = head_size}), "");
  }
}

TEST(WhyNoKernels, NamesTheVersionOrTheSizeOfHeads) {
  EXPECT_EQ(why_no_kernels({.version = "rwkv6", .head_size = 64}),
            "there are no CUDA kernels for rwkv6, only for rwkv4 and rwkv7; use \"cpu\"");
  EXPECT_EQ(why_no_kernels({.version = "rwkv7", .head_size = 16}),
            "there are no CUDA kernels for model.head_size = 16, only for 32, 64, 128; use one of "
            "those, or \"cpu\"");
}

TEST(DeviceName, IsCpuOrCudaWithOrWithoutANumber) {
  for (const char* name : {"cpu", "cuda", "cuda:0", "cuda:12"}) {
    EXPECT_TRUE(is_device_name(name)) << name;
  }
  for (const char* name : {"", "gpu", "cuda:", "cuda:-1", "cuda:1x", "cuda0", "CUDA"}) {
    EXPECT_FALSE(is_device_name(name)) << name;
  }
  EXPECT_EQ(cuda_index("cuda"), 0);
  EXPECT_EQ(cuda_index("cuda:12"), 12);
}

}  // namespace
}  // namespace rwkv
