// Times the kernels of wkv4 and wkv7 on a GPU, each at the shapes of training, beside the bytes
// that they cannot but move at the rate of a copy measured in the same run. No Torch. One JSON
// object a line.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/wkv4_kernel.h"
#include "cuda/wkv7_kernel.h"

namespace rwkv {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    std::fprintf(stderr, "bench_wkv_kernels: %s: %s\n", what, cudaGetErrorString(error));
    std::exit(1);
  }
}

template <typename T>
T* allocate(int64_t count) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T)),
        "memory");
  return static_cast<T*>(memory);
}

// Normal numbers; a piece of them again and again, for what is timed does not depend on them.
template <typename T>
T* random_numbers(int64_t count, float scale, float offset) {
  constexpr int64_t kPiece = int64_t{1} << 20;
  static std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  std::vector<T> piece(static_cast<size_t>(std::min(count, kPiece)));
  for (T& number : piece) {
    number = static_cast<T>(offset + scale * normal(random));
  }
  T* numbers = allocate<T>(count);
  for (int64_t at = 0; at < count; at += kPiece) {
    const auto bytes = static_cast<size_t>(std::min(kPiece, count - at)) * sizeof(T);
    check(cudaMemcpy(numbers + at, piece.data(), bytes, cudaMemcpyHostToDevice), "copy");
  }
  return numbers;
}

// Median over launches, each after a sweep through more than the second-level cache.
double microseconds_of(const std::function<cudaError_t(cudaStream_t)>& launch, const char* what) {
  constexpr size_t kSweepBytes = size_t{1} << 28;
  void* const sweep = allocate<char>(kSweepBytes);
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < 13; ++i) {
    check(cudaMemsetAsync(sweep, i, kSweepBytes, nullptr), "sweep");
    check(cudaEventRecord(begin, nullptr), "event");
    check(launch(nullptr), what);
    check(cudaEventRecord(end, nullptr), "event");
    check(cudaEventSynchronize(end), what);
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin, end), "event");
    if (i >= 3) {
      times.push_back(1000 * milliseconds);
    }
  }
  check(cudaFree(sweep), "memory");
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

double copy_bytes_per_us() {
  constexpr size_t kBytes = size_t{1} << 30;
  char* from = allocate<char>(kBytes);
  char* to = allocate<char>(kBytes);
  check(cudaMemset(from, 1, kBytes), "memset");
  const double us = microseconds_of(
      [&](cudaStream_t stream) {
        return cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, stream);
      },
      "copy");
  cudaFree(from);
  cudaFree(to);
  return 2.0 * static_cast<double>(kBytes) / us;
}

void print_row(const char* kernel,
               const char* shape,
               double forward_us,
               double forward_floor,
               double backward_us,
               double backward_floor) {
  std::printf(
      "{\"kernel\": \"%s\", \"shape\": \"%s\", \"forward_us\": %.1f, \"forward_floor_us\": %.1f, "
      "\"forward_over_floor\": %.2f, \"backward_us\": %.1f, \"backward_floor_us\": %.1f, "
      "\"backward_over_floor\": %.2f}\n",
      kernel,
      shape,
      forward_us,
      forward_floor,
      forward_us / forward_floor,
      backward_us,
      backward_floor,
      backward_us / backward_floor);
  std::fflush(stdout);
  // Of all that was allocated: the next shape takes its place.
  check(cudaDeviceReset(), "reset");
}

struct Shape {
  int64_t batch_size, seq_len, dim_att;
};

void bench_wkv4(Wkv4Kernel kernel, const char* name, const Shape& shape, double bytes_per_us) {
  using Element = __nv_bfloat16;
  const int64_t size = shape.batch_size * shape.seq_len * shape.dim_att;
  const int64_t state = 3 * shape.batch_size * shape.dim_att;
  const auto scratch = [&](bool is_backward) {
    return allocate<float>(wkv4_scratch_floats<Element>(
        kernel, shape.batch_size, shape.seq_len, shape.dim_att, is_backward));
  };
  const Wkv4Forward<Element> forward{.B = shape.batch_size,
                                     .T = shape.seq_len,
                                     .A = shape.dim_att,
                                     .w_log = random_numbers<float>(shape.dim_att, 0.1F, -0.5F),
                                     .k = random_numbers<Element>(size, 1, 0),
                                     .v = random_numbers<Element>(size, 1, 0),
                                     .u = random_numbers<float>(shape.dim_att, 0.3F, 0),
                                     .state = random_numbers<float>(state, 0.1F, 1),
                                     .r = random_numbers<Element>(size, 1, 0),
                                     .starts = nullptr,
                                     .y = allocate<Element>(size),
                                     .state_out = allocate<float>(state),
                                     .carries = allocate<float>(wkv4_carries_floats(
                                         shape.batch_size, shape.seq_len, shape.dim_att)),
                                     .scratch = scratch(false)};
  const Wkv4Backward<Element> backward{.B = forward.B,
                                       .T = forward.T,
                                       .A = forward.A,
                                       .w_log = forward.w_log,
                                       .k = forward.k,
                                       .v = forward.v,
                                       .u = forward.u,
                                       .state = forward.state,
                                       .r = forward.r,
                                       .starts = nullptr,
                                       .carries = forward.carries,
                                       .dy = random_numbers<Element>(size, 1, 0),
                                       .dstate_out = nullptr,
                                       .dw_log = allocate<float>(shape.dim_att),
                                       .dk = allocate<Element>(size),
                                       .dv = allocate<Element>(size),
                                       .du = allocate<float>(shape.dim_att),
                                       .dstate = allocate<float>(state),
                                       .dr = allocate<Element>(size),
                                       .scratch = scratch(true)};
  if (launch_wkv4(kernel, forward, nullptr) == cudaErrorNotSupported) {
    return;
  }
  // k, v, r and o; k, v, r, do and their four gradients but do's.
  const double forward_floor = 4.0 * 2 * static_cast<double>(size) / bytes_per_us;
  const double backward_floor = 7.0 * 2 * static_cast<double>(size) / bytes_per_us;
  const double forward_us = microseconds_of(
      [&](cudaStream_t stream) { return launch_wkv4(kernel, forward, stream); }, "wkv4");
  const double backward_us = microseconds_of(
      [&](cudaStream_t stream) { return launch_wkv4_backward(kernel, backward, stream); },
      "wkv4 backward");
  char name_of_shape[64];
  std::snprintf(name_of_shape,
                sizeof name_of_shape,
                "B%ld T%ld A%ld bf16, gated",
                shape.batch_size,
                shape.seq_len,
                shape.dim_att);
  print_row(name, name_of_shape, forward_us, forward_floor, backward_us, backward_floor);
}

// Of heads of 64.
void bench_wkv7(const Shape& shape, double bytes_per_us) {
  using Element = __nv_bfloat16;
  const int64_t size = shape.batch_size * shape.seq_len * shape.dim_att;
  const Wkv7Sizes sizes{
      .B = shape.batch_size, .T = shape.seq_len, .H = shape.dim_att / 64, .N = 64};
  const int64_t state = shape.batch_size * shape.dim_att * 64;
  const Wkv7Inputs<Element> inputs{.sizes = sizes,
                                   .r = random_numbers<Element>(size, 1, 0),
                                   .w_raw = random_numbers<Element>(size, 1, -2),
                                   .k = random_numbers<Element>(size, 0.1F, 0),
                                   .v = random_numbers<Element>(size, 1, 0),
                                   .a = random_numbers<Element>(size, 0.1F, 0),
                                   .b = random_numbers<Element>(size, 0.1F, 0),
                                   .w0 = random_numbers<float>(shape.dim_att, 0.3F, 0),
                                   .starts = nullptr};
  const Wkv7Forward<Element> forward{.in = inputs,
                                     .state = random_numbers<float>(state, 0.1F, 0),
                                     .y = allocate<Element>(size),
                                     .state_out = allocate<float>(state),
                                     .u = allocate<float>(size),
                                     .carries = allocate<float>(wkv7_carries_floats(sizes))};
  const Wkv7Backward<Element> backward{.in = inputs,
                                       .u = forward.u,
                                       .carries = forward.carries,
                                       .dy = random_numbers<Element>(size, 1, 0),
                                       .dstate_out = nullptr,
                                       .dr = allocate<Element>(size),
                                       .dw_raw = allocate<Element>(size),
                                       .dk = allocate<Element>(size),
                                       .dv = allocate<Element>(size),
                                       .da = allocate<Element>(size),
                                       .db = allocate<Element>(size),
                                       .dw0 = allocate<float>(shape.batch_size * shape.dim_att),
                                       .dstate = allocate<float>(state),
                                       .du = allocate<float>(size)};
  // Six inputs and y; these, dy instead of y, and six gradients.
  const double forward_floor = 7.0 * 2 * static_cast<double>(size) / bytes_per_us;
  const double backward_floor = 13.0 * 2 * static_cast<double>(size) / bytes_per_us;
  const double forward_us =
      microseconds_of([&](cudaStream_t stream) { return launch_wkv7(forward, stream); }, "wkv7");
  const double backward_us = microseconds_of(
      [&](cudaStream_t stream) { return launch_wkv7_backward(backward, stream); }, "wkv7 backward");
  char name_of_shape[64];
  std::snprintf(name_of_shape,
                sizeof name_of_shape,
                "B%ld T%ld A%ld bf16, heads of 64",
                shape.batch_size,
                shape.seq_len,
                shape.dim_att);
  print_row("wkv7", name_of_shape, forward_us, forward_floor, backward_us, backward_floor);
}

}  // namespace
}  // namespace rwkv

int main() {
  using rwkv::Wkv4Kernel;
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("bench_wkv_kernels: no GPU here; nothing is timed");
    return 77;
  }
  const double bytes_per_us = rwkv::copy_bytes_per_us();
  std::printf("{\"copy_gb_per_s\": %.0f}\n", bytes_per_us / 1000);
  for (const auto& [kernel, name] : {std::pair{Wkv4Kernel::kPlain, "wkv4 plain"},
                                     std::pair{Wkv4Kernel::kChunkScan, "wkv4 chunk_scan"},
                                     std::pair{Wkv4Kernel::kClusterScan, "wkv4 cluster_scan"}}) {
    for (const rwkv::Shape& shape : {rwkv::Shape{16, 1024, 768},
                                     rwkv::Shape{8, 1024, 2048},
                                     rwkv::Shape{8, 1024, 4096},
                                     rwkv::Shape{4, 4096, 768},
                                     rwkv::Shape{1, 8192, 2048},
                                     rwkv::Shape{1, 65536, 768}}) {
      rwkv::bench_wkv4(kernel, name, shape, bytes_per_us);
    }
  }
  for (const rwkv::Shape& shape : {rwkv::Shape{16, 1024, 768},
                                   rwkv::Shape{8, 1024, 2048},
                                   rwkv::Shape{4, 4096, 768},
                                   rwkv::Shape{1, 8192, 2048}}) {
    rwkv::bench_wkv7(shape, bytes_per_us);
  }
  return 0;
}
