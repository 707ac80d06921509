// AdamW over flat buffers, the sum of squares that clipping needs, and the numbers of a step.
// Source: model/ops/adamw.h; with c the clip factor, at step n (from 1), in this order in fp32:
//   g = c gradient
//   m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
//   p = (1 - lr weight_decay) p - (lr / (1 - beta1^n)) m / (sqrt(v) / sqrt(1 - beta2^n) + eps)
// Factors of a range are computed in fp64 and rounded once: 1 - beta2 of a float beta2 = 0.99 is
// wrong by 1e-6.
//
// Launch shape of the update: as many blocks of 256 threads as the device holds at once, for each
// works out the ranges' factors (two powers in fp64) before it begins. They take pieces of 4096
// elements in turn; a piece lies in one range, so its factors are the same for the whole block. A
// thread's vector is four elements: 16 bytes of each fp32 buffer and 8 of each bf16 one keep every
// access of a warp contiguous (eight would leave gaps between the halves of an fp32 vector). The
// four or five loads of a vector are issued together, 56 bytes a thread. 64 registers, four blocks
// a multiprocessor; 576 bytes of shared memory, for the factors. Floor, bytes a parameter with a
// gradient in bf16: 28 with an fp32 master and bf16 weights, 26 with a split master, 26 with an
// fp32 master alone; 2 more for a gradient in fp32. 1515 M parameters at 28: 42.4 GB, 14.5 ms
// at 2.93 TB/s; division and square root to the last bit cost about 70 instructions an element, 3.6
// ms of issue, which overlap. Sum of squares: 2 or 4 bytes an element, pieces of 32 Ki elements,
// one a block, whose sums another block adds.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cuda/adamw_kernel.h"
#include "cuda/launch.h"
#include "cuda/packed.cuh"

namespace rwkv {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// ---- Sum of squares -----------------------------------------------------------------------------

// Long enough to be worth a block; short enough that the last blocks to run do not leave the device
// idle for long (169 M parameters are 5169 pieces).
constexpr int64_t kSumPiece = int64_t{1} << 15;

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads)
    sum_of_squares_kernel(const Element* __restrict__ x, int64_t n, double* partials) {
  const int64_t begin = blockIdx.x * kSumPiece;
  const int count = static_cast<int>(n - begin < kSumPiece ? n - begin : kSumPiece);
  x += begin;
  double sum = 0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < count / kWidth; i += kThreads) {
    const auto packed = load_packed<kWidth>(x + i * kWidth);
    float squares = 0;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float value = to_float(packed.x[j]);
      squares += value * value;
    }
    sum += squares;
  }
  const int rest = count / kWidth * kWidth + static_cast<int>(threadIdx.x);
  if (rest < count) {
    const float value = to_float(x[rest]);
    sum += value * value;
  }
  sum = block_sum<kWarps>(sum, static_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    add_partials_kernel(const double* __restrict__ partials, int64_t count, double* total) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum += partials[i];
  }
  sum = block_sum<kWarps>(sum, static_cast<double*>(shared_memory()));
  if (threadIdx.x == 0) {
    *total += sum;
  }
}

// ---- The numbers of a step ----------------------------------------------------------------------

__device__ __forceinline__ bool is_finite(double x) {
  return fabs(x) <= DBL_MAX;  // not so for a NaN
}

__global__ void begin_adamw_kernel(AdamwNumbers* numbers,
                                   const double* sum_of_squares,
                                   const double* loss,
                                   double clip_norm) {
  const double norm = sqrt(*sum_of_squares);
  const double clip = clip_norm / (norm + 1e-6);
  numbers->loss = *loss;
  numbers->gradient_norm = norm;
  numbers->clip = clip_norm > 0 && clip < 1 ? clip : 1;
  if (!is_finite(norm) || !is_finite(*loss)) {
    numbers->skip = 1;
  }
  const bool is_outlier = *loss > numbers->loss_limit || norm > numbers->gradient_norm_limit;
  numbers->outlier = is_outlier ? 1 : 0;
  if (numbers->skip == 0 && !is_outlier) {
    numbers->steps += 1;
  }
}

// ---- The update ---------------------------------------------------------------------------------

constexpr int kWidth = 4;
constexpr int64_t kPiece = 4096;
// With 64 registers a thread; 57 KiB of loads in flight, three times what memory's latency asks
// for.
constexpr int kBlocksPerMultiprocessor = 4;

// Of one range; what all have in common is repeated.
struct RangeFactors {
  float lr_over_correction1;  // lr / (1 - beta1^n)
  float root_correction2;     // 1 / sqrt(1 - beta2^n)
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float eps;
  float keep;  // 1 - lr weight_decay
  float clip;
};

__device__ RangeFactors factors_of(const AdamwRange& range,
                                   const AdamwFactors& factors,
                                   const AdamwNumbers& numbers) {
  const double lr = numbers.lr * range.lr_scale;
  const double correction1 = 1 - pow(factors.beta1, numbers.steps);
  const double correction2 = 1 - pow(factors.beta2, numbers.steps);
  return {.lr_over_correction1 = static_cast<float>(lr / correction1),
          .root_correction2 = static_cast<float>(1 / sqrt(correction2)),
          .beta1 = static_cast<float>(factors.beta1),
          .one_minus_beta1 = static_cast<float>(1 - factors.beta1),
          .beta2 = static_cast<float>(factors.beta2),
          .one_minus_beta2 = static_cast<float>(1 - factors.beta2),
          .eps = static_cast<float>(factors.eps),
          .keep = static_cast<float>(1 - lr * range.weight_decay),
          .clip = static_cast<float>(numbers.clip)};
}

__device__ __forceinline__ float updated(
    float before, float gradient, const RangeFactors& f, float& m, float& v) {
  // Fused where it says so: the compiler's choice could differ between the kernels, whose masters
  // are to agree bit for bit.
  const float g = gradient * f.clip;
  m = fmaf(f.beta1, m, f.one_minus_beta1 * g);
  v = fmaf(f.beta2, v, f.one_minus_beta2 * g * g);
  const float root = fmaf(sqrtf(v), f.root_correction2, f.eps);
  return fmaf(f.keep, before, -(f.lr_over_correction1 * m / root));
}

struct SplitMaster {
  __nv_bfloat16 weight;
  int16_t low;
};
__device__ __forceinline__ SplitMaster split(float master) {
  const uint32_t bits = __float_as_uint(master);
  // The carry out of a NaN's mantissa would make a number of it.
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t high = is_nan ? 0x7fffu : (bits + 0x8000u) >> 16;
  const uint32_t low = is_nan ? 0 : bits;
  return {__ushort_as_bfloat16(static_cast<uint16_t>(high)),
          static_cast<int16_t>(static_cast<uint16_t>(low))};
}
__device__ __forceinline__ float join(__nv_bfloat16 weight, int16_t low) {
  return __uint_as_float((static_cast<uint32_t>(__bfloat16_as_ushort(weight)) << 16) +
                         static_cast<uint32_t>(static_cast<int32_t>(low)));
}

// A master of its own, of which the weights, if there are any, are a copy.
struct WholeMaster {
  float* master;
  __nv_bfloat16* weights;  // may be null

  template <int kCount>
  __device__ __forceinline__ void load(int64_t at, float (&p)[kCount]) const {
    const auto packed = load_packed<kCount>(master + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      p[i] = packed.x[i];
    }
  }
  template <int kCount>
  __device__ __forceinline__ void store(int64_t at, const float (&p)[kCount]) const {
    Packed<float, kCount> exact;
    Packed<__nv_bfloat16, kCount> rounded;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      exact.x[i] = p[i];
      rounded.x[i] = from_float<__nv_bfloat16>(p[i]);
    }
    store_packed(master + at, exact);
    if (weights != nullptr) {
      store_packed(weights + at, rounded);
    }
  }
  bool is_aligned_to_16() const {
    return is_aligned(master, 16) && is_aligned(weights, 16);
  }
};

struct HalvedMaster {
  __nv_bfloat16* weights;
  int16_t* low;

  template <int kCount>
  __device__ __forceinline__ void load(int64_t at, float (&p)[kCount]) const {
    const auto high_halves = load_packed<kCount>(weights + at);
    const auto low_halves = load_packed<kCount>(low + at);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      p[i] = join(high_halves.x[i], low_halves.x[i]);
    }
  }
  template <int kCount>
  __device__ __forceinline__ void store(int64_t at, const float (&p)[kCount]) const {
    Packed<__nv_bfloat16, kCount> high_halves;
    Packed<int16_t, kCount> low_halves;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const SplitMaster halves = split(p[i]);
      high_halves.x[i] = halves.weight;
      low_halves.x[i] = halves.low;
    }
    store_packed(weights + at, high_halves);
    store_packed(low + at, low_halves);
  }
  bool is_aligned_to_16() const {
    return is_aligned(weights, 16) && is_aligned(low, 16);
  }
};

template <typename Gradient, typename Master>
struct UpdateBuffers {
  Master master;
  float* m;
  float* v;
  const Gradient* gradient;

  // Of kCount elements from `at` on.
  template <int kCount>
  __device__ __forceinline__ void update(int64_t at, const RangeFactors& factors) const {
    const auto gradients = load_packed<kCount>(gradient + at);
    auto m4 = load_packed<kCount>(m + at);
    auto v4 = load_packed<kCount>(v + at);
    float p[kCount];
    master.load(at, p);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      p[i] = updated(p[i], to_float(gradients.x[i]), factors, m4.x[i], v4.x[i]);
    }
    store_packed(m + at, m4);
    store_packed(v + at, v4);
    master.store(at, p);
  }
};

__host__ __device__ __forceinline__ int64_t pieces_of(const AdamwRange& range) {
  return ceil_div(range.end - range.begin, kPiece);
}

template <typename Gradient, typename Master>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    adamw_kernel(const UpdateBuffers<Gradient, Master> buffers,
                 const __grid_constant__ AdamwRanges ranges,
                 const AdamwFactors factors,
                 const AdamwNumbers* numbers) {
  if (numbers->skip != 0 || numbers->outlier != 0) {
    return;
  }
  RangeFactors* of_range = static_cast<RangeFactors*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < ranges.count) {
    of_range[thread] = factors_of(ranges.ranges[thread], factors, *numbers);
  }
  __syncthreads();

  int64_t piece = blockIdx.x;  // in the range, once that is found
  for (int range = 0; range < ranges.count;) {
    const int64_t pieces = pieces_of(ranges.ranges[range]);
    if (piece >= pieces) {
      piece -= pieces;
      ++range;
      continue;
    }
    const RangeFactors own = of_range[range];
    const int64_t begin = ranges.ranges[range].begin + piece * kPiece;
    const int64_t left = ranges.ranges[range].end - begin;
    const int count = static_cast<int>(left < kPiece ? left : kPiece);
    const int vectors = begin % kWidth == 0 ? count / kWidth : 0;
    for (int i = thread; i < vectors; i += kThreads) {
      buffers.template update<kWidth>(begin + i * kWidth, own);
    }
    for (int i = vectors * kWidth + thread; i < count; i += kThreads) {
      buffers.template update<1>(begin + i, own);
    }
    piece += gridDim.x;
  }
}

// Blocks that the device holds at once.
cudaError_t resident_blocks(int64_t* blocks) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  *blocks = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
  return error;
}

template <typename Gradient, typename Master>
cudaError_t launch_update(const AdamwUpdate<Gradient>& a,
                          const Master& master,
                          cudaStream_t stream) {
  const UpdateBuffers<Gradient, Master> buffers{master, a.m, a.v, a.gradient};
  const AdamwRanges& ranges = a.ranges;
  if (ranges.count < 0 || ranges.count > kMaxAdamwRanges) {
    return cudaErrorInvalidValue;
  }
  if (!master.is_aligned_to_16() || !is_aligned(a.m, 16) || !is_aligned(a.v, 16) ||
      !is_aligned(a.gradient, 16)) {
    return cudaErrorMisalignedAddress;
  }
  int64_t pieces = 0;
  for (int range = 0; range < ranges.count; ++range) {
    pieces += pieces_of(ranges.ranges[range]);
  }
  if (pieces == 0) {
    return cudaSuccess;
  }
  int64_t at_once = 0;
  const cudaError_t error = resident_blocks(&at_once);
  if (error != cudaSuccess) {
    return error;
  }
  return launch_kernel(&adamw_kernel<Gradient, Master>,
                       {.grid = dim3(static_cast<unsigned>(std::min(pieces, at_once))),
                        .block = dim3(kThreads),
                        .shared_bytes = kMaxAdamwRanges * sizeof(RangeFactors)},
                       stream,
                       buffers,
                       ranges,
                       a.factors,
                       a.numbers);
}

// ---- Split masters ------------------------------------------------------------------------------

// At starts and ends of runs; nothing here is worth vectors.
template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) convert_master_kernel(From from, To to, int64_t n) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at < n) {
    float p[1];
    from.load(at, p);
    to.store(at, p);
  }
}

template <typename From, typename To>
cudaError_t launch_convert(const From& from, const To& to, int64_t n, cudaStream_t stream) {
  return n == 0 ? cudaSuccess
                : launch_kernel(&convert_master_kernel<From, To>,
                                {.grid = dim3(static_cast<unsigned>(ceil_div(n, kThreads))),
                                 .block = dim3(kThreads)},
                                stream,
                                from,
                                to,
                                n);
}

}  // namespace

int64_t sum_of_squares_scratch_size(int64_t n) {
  return ceil_div(n, kSumPiece);
}

template <typename Element>
cudaError_t launch_add_sum_of_squares(
    const Element* x, int64_t n, double* scratch, double* sum, cudaStream_t stream) {
  if (n == 0) {
    return cudaSuccess;
  }
  const int64_t pieces = sum_of_squares_scratch_size(n);
  const auto kernel = is_aligned(x, 16) ? &sum_of_squares_kernel<Element, kPackedWidth<Element>>
                                        : &sum_of_squares_kernel<Element, 1>;
  const cudaError_t error = launch_kernel(kernel,
                                          {.grid = dim3(static_cast<unsigned>(pieces)),
                                           .block = dim3(kThreads),
                                           .shared_bytes = kWarps * sizeof(double)},
                                          stream,
                                          x,
                                          n,
                                          scratch);
  if (error != cudaSuccess) {
    return error;
  }
  return launch_kernel(
      &add_partials_kernel,
      {.grid = dim3(1), .block = dim3(kThreads), .shared_bytes = kWarps * sizeof(double)},
      stream,
      scratch,
      pieces,
      sum);
}

cudaError_t launch_begin_adamw(AdamwNumbers* numbers,
                               const double* sum_of_squares,
                               const double* loss,
                               double clip_norm,
                               cudaStream_t stream) {
  return launch_kernel(&begin_adamw_kernel,
                       {.grid = dim3(1), .block = dim3(1)},
                       stream,
                       numbers,
                       sum_of_squares,
                       loss,
                       clip_norm);
}

template <typename Gradient>
cudaError_t launch_adamw(const AdamwUpdate<Gradient>& arguments, cudaStream_t stream) {
  const auto& a = arguments;
  return a.master != nullptr ? launch_update(a, WholeMaster{a.master, a.weights}, stream)
                             : launch_update(a, HalvedMaster{a.weights, a.low}, stream);
}

cudaError_t launch_split_master(
    const float* master, __nv_bfloat16* weights, int16_t* low, int64_t n, cudaStream_t stream) {
  // Only read.
  const WholeMaster from{const_cast<float*>(master), nullptr};
  return launch_convert(from, HalvedMaster{weights, low}, n, stream);
}

cudaError_t launch_join_master(const __nv_bfloat16* weights,
                               const int16_t* low,
                               float* master,
                               int64_t n,
                               cudaStream_t stream) {
  // Only read.
  const HalvedMaster from{const_cast<__nv_bfloat16*>(weights), const_cast<int16_t*>(low)};
  return launch_convert(from, WholeMaster{master, nullptr}, n, stream);
}

#define RWKV_INSTANTIATE(Element)                               \
  template cudaError_t launch_add_sum_of_squares(               \
      const Element*, int64_t, double*, double*, cudaStream_t); \
  template cudaError_t launch_adamw(const AdamwUpdate<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
