// Cross-entropy of a row of logits with a z-loss, and its gradient over the same bytes.
//
//   lse = log sum exp(logits)      nll = lse - logits[target]      total = nll + z_loss * lse^2
//   d total / d logits[j] = (1 + 2 z_loss lse) * exp(logits[j] - lse) - (j == target)
//
// A target of -1 does not count: losses and gradients are 0. Any other target outside of the vocabulary makes
// the row's loss and gradient NaN, which a trainer's guard sees: there is no error to raise without waiting for
// the device. Bytes per row: 4 vocab in bfloat16 (one read, one write); 2 vocab without gradients.
//
// A block takes a row and keeps it in shared memory: 32000 bfloat16 logits are 62.5 KiB, so three blocks share a
// multiprocessor of a Hopper, and while one waits for its row another writes. Rows too long for that (115,000
// bfloat16 logits on a Hopper) and unaligned ones are read twice. Sums are float32, over lanes, warps and threads in
// a fixed order: equal from run to run, and a row's results depend on that row alone.
#include "targets.cuh"

#include <cuda_pipeline.h>

#include <cmath>

namespace mtlm {
namespace {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;

struct SoftmaxLoss {
  void* logits;            // [rows, vocab], replaced by their gradient if `gradients`
  int64_t stride;          // elements from row to row
  Targets targets;         // [rows]
  float* total;            // [rows]
  float* nll;              // [rows]
  float z_loss;
  bool gradients;
};

// max and sum of exp(x - max) of what was seen so far.
struct LogSum {
  float max = -INFINITY;
  float sum = 0;

  __device__ __forceinline__ void add(LogSum other) {
    const float top = fmaxf(max, other.max);
    if (top == -INFINITY) {  // nothing but -infinity and NaN on either side
      sum += other.sum;
      return;
    }
    sum = sum * exp2f((max - top) * LOG2_E) + other.sum * exp2f((other.max - top) * LOG2_E);
    max = top;
  }
};

// The log of the sum over all threads of a block, in every thread.
__device__ float log_sum_over_block(LogSum mine) {
  __shared__ LogSum warp_sums[WARPS];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    LogSum other;
    other.max = __shfl_xor_sync(ALL_LANES, mine.max, offset);
    other.sum = __shfl_xor_sync(ALL_LANES, mine.sum, offset);
    mine.add(other);
  }
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = mine;
  __syncthreads();
  mine = warp_sums[threadIdx.x % WARPS];
#pragma unroll
  for (int offset = WARPS / 2; offset > 0; offset /= 2) {
    LogSum other;
    other.max = __shfl_xor_sync(ALL_LANES, mine.max, offset);
    other.sum = __shfl_xor_sync(ALL_LANES, mine.sum, offset);
    mine.add(other);
  }
  return mine.max + logf(mine.sum);
}

// The gradient of N logits that begin at column `at`, in place of them.
template <int N>
__device__ __forceinline__ void to_gradient(float (&x)[N], int64_t at, int64_t target, float lse, float weight) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = weight * exp2f((x[i] - lse) * LOG2_E);
    if (at + i == target) x[i] -= 1.0f;
  }
}

// Thread 0 writes the row's losses; the weight of the softmax in the gradient, NaN for a target that is none.
__device__ float finish_row(const SoftmaxLoss& a, int64_t row, int64_t target, int64_t vocab, float lse,
                            float target_logit) {
  const bool valid = target >= 0 && target < vocab;
  if (threadIdx.x == 0) {
    const float nll = valid ? lse - target_logit : NAN;
    a.nll[row] = nll;
    a.total[row] = a.z_loss == 0 ? nll : nll + a.z_loss * lse * lse;
  }
  return valid ? 1.0f + 2.0f * a.z_loss * lse : NAN;
}

template <typename T>
__device__ void ignore_row(const SoftmaxLoss& a, T* logits, int64_t row, int64_t vocab) {
  if (threadIdx.x == 0) a.nll[row] = a.total[row] = 0;
  if (!a.gradients) return;
  for (int64_t c = threadIdx.x; c < vocab; c += THREADS) logits[c] = from_float<T>(0);
}

// The N logits at `at`, where this thread itself put them.
template <typename T, int N>
__device__ __forceinline__ void load_shared(const T* row, int at, float (&out)[N]) {
  const uint4 v = *reinterpret_cast<const uint4*>(row + at);
  const unsigned word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      out[2 * i] = __uint_as_float(word[i] << 16);
      out[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    } else {
      out[i] = __uint_as_float(word[i]);
    }
  }
}

template <typename T>
__global__ __launch_bounds__(THREADS, 3) void row_in_shared(SoftmaxLoss a, int vocab) {
  extern __shared__ uint4 held[];
  constexpr int N = 16 / sizeof(T);
  T* const kept = reinterpret_cast<T*>(held);
  const int64_t row = blockIdx.x;
  T* const logits = static_cast<T*>(a.logits) + row * a.stride;
  const int64_t target = a.targets.at(row);
  if (target == -1) return ignore_row(a, logits, row, vocab);
  const int first = threadIdx.x * N;
  for (int at = first; at < vocab; at += THREADS * N) __pipeline_memcpy_async(kept + at, logits + at, 16);
  __pipeline_commit();
  const float target_logit = target >= 0 && target < vocab ? to_float(logits[target]) : 0;
  __pipeline_wait_prior(0);
  LogSum mine;
  for (int at = first; at < vocab; at += THREADS * N) {
    float x[N];
    load_shared<T, N>(kept, at, x);
#pragma unroll
    for (int i = 0; i < N; ++i) mine.max = fmaxf(mine.max, x[i]);
  }
  const float top = mine.max == -INFINITY ? 0 : mine.max;
  for (int at = first; at < vocab; at += THREADS * N) {
    float x[N];
    load_shared<T, N>(kept, at, x);
#pragma unroll
    for (int i = 0; i < N; ++i) mine.sum += exp2f((x[i] - top) * LOG2_E);
  }
  // Its barrier also stands between the reading of the target's logit and the writing of the row.
  const float lse = log_sum_over_block(mine);
  const float weight = finish_row(a, row, target, vocab, lse, target_logit);
  if (!a.gradients) return;
  for (int at = first; at < vocab; at += THREADS * N) {
    float x[N];
    load_shared<T, N>(kept, at, x);
    to_gradient<N>(x, at, target, lse, weight);
    store<T, N>(logits + at, x);
  }
}

template <typename T, int N>
__global__ __launch_bounds__(THREADS) void row_read_twice(SoftmaxLoss a, int64_t vocab) {
  const int64_t row = blockIdx.x;
  T* logits = static_cast<T*>(a.logits) + row * a.stride;
  const int64_t target = a.targets.at(row);
  if (target == -1) return ignore_row(a, logits, row, vocab);
  const float target_logit = target >= 0 && target < vocab ? to_float(logits[target]) : 0;
  LogSum mine;
  for (int64_t at = threadIdx.x * N; at < vocab; at += THREADS * N) {
    float x[N];
    load<T, N>(logits + at, x);
    LogSum here;
#pragma unroll
    for (int i = 0; i < N; ++i) here.max = fmaxf(here.max, x[i]);
    const float top = here.max == -INFINITY ? 0 : here.max;
#pragma unroll
    for (int i = 0; i < N; ++i) here.sum += exp2f((x[i] - top) * LOG2_E);
    mine.add(here);
  }
  const float lse = log_sum_over_block(mine);
  const float weight = finish_row(a, row, target, vocab, lse, target_logit);
  if (!a.gradients) return;
  for (int64_t at = threadIdx.x * N; at < vocab; at += THREADS * N) {
    float x[N];
    load<T, N>(logits + at, x);
    to_gradient<N>(x, at, target, lse, weight);
    store<T, N>(logits + at, x);
  }
}

template <typename T>
cudaError_t typed(const SoftmaxLoss& a, int64_t rows, int64_t vocab, cudaStream_t stream) {
  constexpr int64_t size = sizeof(T);
  const auto grid = static_cast<unsigned>(rows);
  if (!aligned(a.logits, 16) || a.stride * size % 16 != 0 || vocab * size % 16 != 0) {
    row_read_twice<T, 1><<<grid, THREADS, 0, stream>>>(a, vocab);
    return cudaGetLastError();
  }
  if (vocab * size > shared_memory() - 1024) {  // some of it is for the sums over a block
    row_read_twice<T, 16 / size><<<grid, THREADS, 0, stream>>>(a, vocab);
    return cudaGetLastError();
  }
  const int shared = static_cast<int>(vocab * size);
  return launch_with_shared(row_in_shared<T>, grid, THREADS, shared, stream, a, static_cast<int>(vocab));
}

}  // namespace

cudaError_t softmax_loss_(cudaStream_t stream, Out logits, View targets, Out total, Out nll, double z_loss,
                          bool gradients) {
  check_matrix(logits, "logits");
  check_rows_contiguous(logits, "logits");
  const int64_t rows = logits.sizes[0], vocab = logits.sizes[1];
  REQUIRE(vocab <= MOST_BLOCKS, "logits has ", vocab, " columns; at most ", MOST_BLOCKS);
  const Targets ids = check_targets(targets, logits, rows);
  check(total, "total", logits, {rows}, Type::float32);
  check(nll, "nll", logits, {rows}, Type::float32);
  const Type type = float_type(logits, "logits");
  const SoftmaxLoss a = {logits.out(),     logits.strides[0],          ids,      total.out<float>(),
                         nll.out<float>(), static_cast<float>(z_loss), gradients};
  if (rows == 0) return cudaSuccess;
  return type == Type::bfloat16 ? typed<bf16>(a, rows, vocab, stream) : typed<float>(a, rows, vocab, stream);
}

}  // namespace mtlm
