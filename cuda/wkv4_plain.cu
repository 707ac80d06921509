// wkv4 as it is defined, forward and backward: a thread walks the tokens of one batch row and one
// channel. Equations: model/ops/wkv4.h; sums with their scale: wkv4_scan.cuh.
//
// Launch shape: 128 threads a block, neighbours on neighbouring channels, nothing shared. There are
// B A threads and T dependent steps, so latency sets the time: it is here to be obviously right,
// for the other kernels to be compared with. Backward goes through T in tiles of 128 tokens, from
// forward's carries: it finds the states at every 16th token of a tile again, then each 16 tokens'
// states, all in local memory, and walks back. Floor, bytes an element in bf16: forward 6, with a
// gate 8; backward 16, with a gate 20, as k, v are read three times. Assumed: w_log < 0; nothing
// else of the inputs' range.
#include "cuda/launch.h"
#include "cuda/wkv4_launch.h"
#include "cuda/wkv4_scan.cuh"

namespace rwkv::wkv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kTileLen = kWkv4CarryLen;
constexpr int kPieceLen = 16;
constexpr int kPieces = kTileLen / kPieceLen;
// Blocks of backward that share a multiprocessor: as many as leave registers for 16 tokens' states.
constexpr int kBackwardBlocks = kArchitecture < 1000 ? 5 : 4;

template <typename Element>
__global__ void __launch_bounds__(kThreads) plain_forward_kernel(const Wkv4Forward<Element> args) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= args.B * args.A) {
    return;
  }
  const int64_t dim = args.A;
  const int64_t b = thread / dim;
  const int64_t c = thread % dim;
  const int64_t tiles = ceil_div(args.T, kTileLen);
  const Channel channel = load_channel(args.w_log, args.u, c);
  Sums state = load_state(args.state + b * 3 * dim, dim, c);
  float* carries = args.carries == nullptr ? nullptr : args.carries + b * (tiles + 1) * 3 * dim;
  for (int64_t t = 0; t < args.T; ++t) {
    if (carries != nullptr && t % kTileLen == 0) {
      store_sums(carries + t / kTileLen * 3 * dim, dim, c, state);
    }
    if (args.starts != nullptr && args.starts[b * args.T + t]) {
      state = nothing();
    }
    const int64_t at = (b * args.T + t) * dim + c;
    const float k = to_float(args.k[at]);
    const float v = to_float(args.v[at]);
    float y = average(state, channel.u2, k, v).y;
    if (args.r != nullptr) {
      y *= sigmoid(to_float(args.r[at]));
    }
    args.y[at] = from_float<Element>(y);
    state = after_token(state, channel.w2, k, v);
  }
  store_state(args.state_out + b * 3 * dim, dim, c, state);
  if (carries != nullptr) {
    store_sums(carries + tiles * 3 * dim, dim, c, state);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    plain_backward_kernel(const Wkv4Backward<Element> args,
                          float* __restrict__ dw_rows,
                          float* __restrict__ du_rows) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= args.B * args.A) {
    return;
  }
  const int64_t dim = args.A;
  const int64_t b = thread / dim;
  const int64_t c = thread % dim;
  const int64_t tiles = ceil_div(args.T, kTileLen);
  const Channel channel = load_channel(args.w_log, args.u, c);
  const float* carries = args.carries + b * (tiles + 1) * 3 * dim;
  const auto starts_at = [&](int64_t t) {
    return args.starts != nullptr && args.starts[b * args.T + t];
  };
  const auto offset_of = [&](int64_t t) { return (b * args.T + t) * dim + c; };
  // The state that token t sees, from the one before it.
  const auto seen = [&](Sums state, int64_t t) { return starts_at(t) ? nothing() : state; };
  const auto next = [&](Sums state, int64_t t) {
    const int64_t at = offset_of(t);
    return after_token(state, channel.w2, to_float(args.k[at]), to_float(args.v[at]));
  };

  float dw_log = 0.0f;
  float du = 0.0f;
  Sums adjoint = load_adjoint(args.dstate_out == nullptr ? nullptr : args.dstate_out + b * 3 * dim,
                              carries[tiles * 3 * dim + 2 * dim + c],
                              dim,
                              c);
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t begin = tile * kTileLen;
    Sums pieces[kPieces];
    Sums state = load_sums(carries + tile * 3 * dim, dim, c);
    for (int piece = 0; piece < kPieces; ++piece) {
      pieces[piece] = state;
      for (int i = 0; i < kPieceLen; ++i) {
        const int64_t t = begin + piece * kPieceLen + i;
        if (t < args.T) {
          state = next(seen(state, t), t);
        }
      }
    }
    for (int piece = kPieces - 1; piece >= 0; --piece) {
      const int64_t first = begin + piece * kPieceLen;
      Sums states[kPieceLen];
      state = pieces[piece];
      for (int i = 0; i < kPieceLen && first + i < args.T; ++i) {
        states[i] = seen(state, first + i);
        state = next(states[i], first + i);
      }
      for (int i = kPieceLen - 1; i >= 0; --i) {
        const int64_t t = first + i;
        if (t >= args.T) {
          continue;
        }
        const int64_t at = offset_of(t);
        const float k = to_float(args.k[at]);
        const float v = to_float(args.v[at]);
        float dy = to_float(args.dy[at]);
        if (args.r != nullptr) {
          const Average token = average(states[i], channel.u2, k, v);
          const float gate = sigmoid(to_float(args.r[at]));
          dy *= gate;
          args.dr[at] = from_float<Element>(dy * token.y * (1.0f - gate));
        }
        const TokenGradients gradients = through_token(states[i], channel, k, v, dy, adjoint);
        args.dk[at] = from_float<Element>(gradients.dk);
        args.dv[at] = from_float<Element>(gradients.dv);
        du += gradients.du;
        dw_log += gradients.dw_log;
        if (starts_at(t)) {
          adjoint = nothing();
        }
      }
    }
  }
  store_dstate(args.dstate + b * 3 * dim, args.state + b * 3 * dim, dim, c, adjoint);
  dw_rows[b * dim + c] = dw_log;
  du_rows[b * dim + c] = du;
}

LaunchShape shape_of(int64_t B, int64_t A) {
  return {.grid = dim3(static_cast<unsigned>(ceil_div(B * A, kThreads))), .block = dim3(kThreads)};
}

}  // namespace

int64_t plain_scratch_floats(int64_t B, int64_t A, bool backward) {
  return backward ? 2 * B * A : 0;
}

template <typename Element>
cudaError_t launch_plain(const Wkv4Forward<Element>& args, cudaStream_t stream) {
  return launch_kernel(&plain_forward_kernel<Element>, shape_of(args.B, args.A), stream, args);
}

template <typename Element>
cudaError_t launch_plain_backward(const Wkv4Backward<Element>& args, cudaStream_t stream) {
  float* dw_rows = args.scratch;
  float* du_rows = args.scratch + args.B * args.A;
  cudaError_t error = launch_kernel(
      &plain_backward_kernel<Element>, shape_of(args.B, args.A), stream, args, dw_rows, du_rows);
  return error == cudaSuccess
             ? launch_parameter_sums(dw_rows, du_rows, args.B, args.A, args.dw_log, args.du, stream)
             : error;
}

#define RWKV_INSTANTIATE(Element)                                               \
  template cudaError_t launch_plain(const Wkv4Forward<Element>&, cudaStream_t); \
  template cudaError_t launch_plain_backward(const Wkv4Backward<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv::wkv4
