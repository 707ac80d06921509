#include "train/bench/trace.h"

#include <fstream>
#include <stdexcept>

#include <torch/csrc/autograd/profiler_kineto.h>

namespace rwkv {

void write_trace(const std::string& path, at::Device device, const std::function<void()>& work) {
  using namespace torch::profiler::impl;
  // The profiler says nothing of a file that it cannot open.
  if (!std::ofstream(path)) {
    throw std::runtime_error(path + ": cannot be written; give another --trace");
  }
  const ProfilerConfig config(ProfilerState::KINETO);
  std::set<ActivityType> activities{ActivityType::CPU};
  if (device.is_cuda()) {
    activities.insert(ActivityType::CUDA);
  }
  torch::autograd::profiler::prepareProfiler(config, activities);
  torch::autograd::profiler::enableProfiler(
      config, activities, {at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION});
  work();
  torch::autograd::profiler::disableProfiler()->save(path);
}

}  // namespace rwkv
