// That librookery_cuda.so loads without a GPU and has a CUDA kernel for every op that a model
// needs.
#include <cstdlib>

#include <ATen/core/dispatch/Dispatcher.h>

#include <dlfcn.h>
#include <gtest/gtest.h>

namespace rwkv {
namespace {

// Ops that have one kernel for all devices, or that the model calls on the CPU alone: RWKV-5.2 and
// 6, whose wkv6 is, are refused on another device before they run.
bool is_for_every_device(const c10::OperatorHandle& op) {
  const std::string& name = op.operator_name().name;
  return op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
         name == "rookery::few_rows_linear" || name == "rookery::wkv6" ||
         name == "rookery::wkv6_backward";
}

TEST(CudaLibrary, HasAKernelForEveryOp) {
  void* library = dlopen(ROOKERY_CUDA_LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const std::string reason = dlerror();
    ASSERT_EQ(std::getenv("CI"), nullptr) << reason;
    GTEST_SKIP() << reason << "; scripts/setup.sh --cuda installs what it needs";
  }
  EXPECT_NE(dlsym(library, "rookery_cuda_runtime"), nullptr);
  int64_t found = 0;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind("rookery::", 0) != 0) {
      continue;
    }
    ++found;
    const auto op = c10::Dispatcher::singleton().findOp(name);
    ASSERT_TRUE(op.has_value()) << name.name;
    EXPECT_TRUE(is_for_every_device(*op) || op->hasKernelForDispatchKey(c10::DispatchKey::CUDA))
        << name.name << " has no CUDA kernel";
  }
  EXPECT_GE(found, 15);
}

}  // namespace
}  // namespace rwkv
