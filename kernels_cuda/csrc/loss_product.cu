// The product of the output head with the softmax of the loss in its epilogue, so that no pass over the logits is left.
// Hopper only.
//
//   shift = logit[target]      exps[j] = exp(logit[j] - shift)      S = sum of exps      nll = log S
//   lse = shift + log S        total = nll + z_loss lse^2           c = 1 + 2 z_loss lse      scale = c / S
//
// The gradient of a row's total by its logits is scale (exps[j] - (j == target) S / c): what is taken away at the target
// is taken away in exps, and the scale of a row goes into what exps is multiplied with. bfloat16 rounds what is left at
// the target by up to 2^-8 of it, and most targets' gradient is nearly -1: scale takes that back. The other ids get the
// error instead. Their gradients sum to what the target's is, so that the root of their squares' sum is no larger.
//
// The row's largest logit, which usually keeps exp from overflowing, is not known before the product ends. The target's
// is, from one dot product, and S >= 1 keeps all that counts. Where S comes above 2^100, a token with a loss of 69 nats,
// the row is computed again as the gradient itself, with a scale of 1: exps and scale stay within what bfloat16 and
// float32 hold.
//
// Logits are never rounded: losses are those of float32 sums, and differ from those of the target's own dot product by
// the order of its sums, some 1e-5. exps are bfloat16, as gradients of logits are elsewhere. A target of -1 does not
// count: exps and all else are 0. Another one outside of the vocabulary makes loss and scale NaN.
//
// Sums are in a fixed order: over a lane's columns, over the lanes of a row, over tiles. A row's results depend on that
// row alone.
#include "epilogue.cuh"
#include "targets.cuh"

#include <cmath>

namespace mtlm {
namespace loss {  // not unnamed: for other architectures kernels are empty, and nothing here is used

using namespace hopper;

constexpr float MOST = 0x1p100f;
constexpr int THREADS = 256, WARPS_OF_BLOCK = THREADS / 32;

struct Softmax {
  struct Results {
    CUtensorMap exps;
    const float* shift;  // [rows]
    float* partials;     // [tiles along the vocabulary, rows]
    int rows, width;
  };
  static constexpr int STAGES = 6, PIECES = 2, BARRIERS = 0, N = TILE, HALVES = 1;
  uint32_t pieces, barriers;
  int lane, written = 0;
  float shift[M_BLOCKS][2];  // in octaves, of the rows whose sums this lane has

  __device__ __forceinline__ int row_of(int row, int m, int i) const { return row + 64 * m + 8 * i + lane / 4; }

  __device__ __forceinline__ void begin(const Results& results, int, int row) {
#pragma unroll
    for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int own = row_of(row, m, i);
        shift[m][i] = own < results.rows ? __ldg(results.shift + own) * LOG2_E : INFINITY;
      }
    }
  }

  __device__ __forceinline__ void finish(const Results& results, int tile, int row, const float (&sums)[M_BLOCKS][64]) {
    float of_rows[M_BLOCKS][2] = {};
#pragma unroll
    for (int chunk = 0; chunk < 2 * M_BLOCKS; ++chunk) {
      const int m = chunk / 2, x = tile * N + chunk % 2 * 64;
      const float* own = sums[m] + chunk % 2 * 32;
      store(*this, &results.exps, x, row + m * 64, [&](int i) {
        const float first = power_of_two(fmaf(own[2 * i], LOG2_E, -shift[m][i % 2]));
        const float second = power_of_two(fmaf(own[2 * i + 1], LOG2_E, -shift[m][i % 2]));
        if (x + i / 2 * 8 < results.width) of_rows[m][i % 2] += first + second;
        return pack_bf16(first, second);
      });
    }
#pragma unroll
    for (int m = 0; m < M_BLOCKS; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = of_rows[m][i];
        sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        sum += __shfl_xor_sync(ALL_LANES, sum, 2);
        const int own = row_of(row, m, i);
        if (lane % 4 == 0 && own < results.rows) {
          results.partials[static_cast<int64_t>(tile) * results.rows + own] = sum;
        }
      }
    }
  }
};

struct Loss {
  const bf16* hidden;  // [rows, d]
  const bf16* table;   // [vocab, d]
  Targets targets;
  float* shift;
  const float* partials;
  int64_t rows, vocab;
  int d, tiles;
  float z_loss;
  bf16* exps;
  float *total, *nll, *scale;
};

// Of two rows of d elements, in every lane of a warp.
__device__ __forceinline__ float dot(const bf16* a, const bf16* b, int d) {
  float sum = 0;
  for (int at = threadIdx.x % 32 * 8; at < d; at += 32 * 8) {
    float x[8], y[8];
    load<bf16, 8>(a + at, x);
    load<bf16, 8>(b + at, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(x[i], y[i], sum);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
  return sum;
}

// The logits of the targets, a warp a row; infinite where exps are to be 0.
__global__ __launch_bounds__(THREADS) void logits_of_targets(Loss a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS_OF_BLOCK + threadIdx.x / 32;
  if (row >= a.rows) return;
  const int64_t target = a.targets.at(row);
  const bool valid = target >= 0 && target < a.vocab;
  const float logit = valid ? dot(a.hidden + row * a.d, a.table + target * a.d, a.d) : INFINITY;
  if (threadIdx.x % 32 == 0) a.shift[row] = logit;
}

// Writes the losses of a row whose exps relative to `shift` have this sum; c of their gradient.
__device__ float finish_losses(const Loss& a, int64_t row, float logit, float shift, float sum) {
  const float lse = shift + logf(sum), nll = logf(sum) + (shift - logit);
  a.nll[row] = nll;
  a.total[row] = a.z_loss == 0 ? nll : nll + a.z_loss * lse * lse;
  return 1.f + 2.f * a.z_loss * lse;
}

// The gradient of a row itself, relative to its largest logit, by all threads of a block.
__device__ void compute_again(const Loss& a, int64_t row) {
  __shared__ float tops[WARPS_OF_BLOCK], sums[WARPS_OF_BLOCK];
  const bf16* h = a.hidden + row * a.d;
  const int64_t target = a.targets.at(row);
  const float logit = a.shift[row];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float top = logit, sum = 0;
  for (int64_t j = warp; j < a.vocab; j += WARPS_OF_BLOCK) {
    const float other = dot(h, a.table + j * a.d, a.d), higher = fmaxf(top, other);
    sum = sum * power_of_two((top - higher) * LOG2_E) + power_of_two((other - higher) * LOG2_E);
    top = higher;
  }
  if (lane == 0) tops[warp] = top, sums[warp] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < WARPS_OF_BLOCK; ++i) top = fmaxf(top, tops[i]);
  for (int i = 0; i < WARPS_OF_BLOCK; ++i) sum += sums[i] * power_of_two((tops[i] - top) * LOG2_E);
  const float share = finish_losses(a, row, logit, top, sum) / sum;  // all threads write the same
  for (int64_t j = warp; j < a.vocab; j += WARPS_OF_BLOCK) {
    const float own = share * power_of_two((dot(h, a.table + j * a.d, a.d) - top) * LOG2_E);
    if (lane == 0) a.exps[row * a.vocab + j] = from_float<bf16>(j == target ? own - 1.f : own);
  }
  a.scale[row] = 1.f;
  __syncthreads();
}

// Losses and scales, a thread a row.
__global__ __launch_bounds__(THREADS) void finish_rows(Loss a) {
  __shared__ int again[THREADS];  // rows of this block; their order does not matter
  __shared__ int n_again;
  if (threadIdx.x == 0) n_again = 0;
  __syncthreads();
  const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS, row = first + threadIdx.x;
  if (row < a.rows) {
    const int64_t target = a.targets.at(row);
    if (target >= 0 && target < a.vocab) {
      float sum = 0;
#pragma unroll 8
      for (int tile = 0; tile < a.tiles; ++tile) sum += a.partials[tile * a.rows + row];
      if (sum > MOST) {
        again[atomicAdd(&n_again, 1)] = threadIdx.x;
      } else {
        const float shift = a.shift[row], weight = finish_losses(a, row, shift, shift, sum);
        const float at_target = 1.f - sum / weight;
        const bf16 stored = from_float<bf16>(at_target);
        a.exps[row * a.vocab + target] = stored;
        a.scale[row] = weight / sum * (at_target == 0 ? 1.f : at_target / to_float(stored));
      }
    } else {
      a.total[row] = a.nll[row] = a.scale[row] = target == -1 ? 0.f : NAN;
    }
  }
  __syncthreads();
  for (int i = 0; i < n_again; ++i) compute_again(a, first + again[i]);
}

}  // namespace loss

using namespace loss;

// hidden [N, D], table [V, D], targets [N] -> exps [N, V]; total, nll and scale [N] in float32.
// shift [N] and partials [ceil(V / 128), N], float32, are room.
cudaError_t loss_product_into(cudaStream_t stream, View hidden, View table, View targets, double z_loss, Out exps,
                              Out total, Out nll, Out scale, Out shift, Out partials) {
  check_matrix(hidden, "hidden");
  check_matrix(table, "table");
  const int64_t rows = hidden.sizes[0], inner = hidden.sizes[1], vocab = table.sizes[0];
  const int64_t tiles = (vocab + Softmax::N - 1) / Softmax::N;
  check_widths(inner, vocab);
  check_operand(hidden, "hidden", hidden, {rows, inner});
  check_operand(table, "table", hidden, {vocab, inner});
  check_operand(exps, "exps", hidden, {rows, vocab});
  const Targets ids = check_targets(targets, hidden, rows);
  check(total, "total", hidden, {rows}, Type::float32);
  check(nll, "nll", hidden, {rows}, Type::float32);
  check(scale, "scale", hidden, {rows}, Type::float32);
  check(shift, "shift", hidden, {rows}, Type::float32);
  check(partials, "partials", hidden, {tiles, rows}, Type::float32);
  if (rows == 0) return cudaSuccess;
  const Loss a = {hidden.as<bf16>(),       table.as<bf16>(),  ids,
                  shift.out<float>(),      partials.as<float>(), rows,
                  vocab,                   static_cast<int>(inner), static_cast<int>(tiles),
                  static_cast<float>(z_loss), exps.out<bf16>(), total.out<float>(),
                  nll.out<float>(),        scale.out<float>()};
  const auto blocks = [](int64_t n, int each) { return static_cast<unsigned>((n + each - 1) / each); };
  logits_of_targets<<<blocks(rows, WARPS_OF_BLOCK), THREADS, 0, stream>>>(a);
  cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  Maps<Softmax> maps{};
  maps.a = describe_matrix(hidden.data, rows, inner, inner, TILE);
  maps.weights[0] = describe_weights(table, vocab, inner, false);
  maps.results = {describe_results(exps), shift.as<float>(), partials.out<float>(), static_cast<int>(rows),
                  static_cast<int>(vocab)};
  error = launch<Softmax, false>(stream, maps, rows, vocab, inner);
  if (error != cudaSuccess) return error;
  finish_rows<<<blocks(rows, THREADS), THREADS, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace mtlm
