// RMSNorm with the residual addition before it (Zhang and Sennrich 2019).
//
//   sum = residual + branch        rstd = 1 / sqrt(mean(sum^2) + eps)        normed = sum * rstd * weight
//
// backward, with g = weight * d_normed:
//   d_x = rstd * g - sum * rstd^3 * mean(g * sum) + d_sum        (the gradient of residual and of branch alike)
//   d_weight = column sums of d_normed * sum * rstd
//
// Saved: sum (which the network keeps anyway) and rstd [rows]. Statistics are float32, of the sum as it is
// rounded in memory. Bytes a row of d: forward 8d in bfloat16 (12d with a float32 residual), backward 8d (16d).
//
// For d of 384, 512 and 768 half a warp or a warp holds a row in registers: one pass over memory. Backward: a
// grid of fixed size walks over the rows, each thread adds up its columns of d_weight in float32 registers, a
// block leaves one row of partials, and a second small kernel adds those in order. No atomics: the result
// depends on the inputs and the number of multiprocessors alone, and a row's results on that row alone.
// Other sizes and unaligned rows take plain loops.
#include "common.cuh"
#include "kernels.h"

namespace mtlm {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int BLOCKS_PER_SM = 2;  // of the backward grid: registers for two blocks of 256 threads

// How a row of D elements lies in the lanes: vectors of 16 bytes of the wider type, one after another.
template <typename X, typename R, int D>
struct Layout {
  static constexpr int VECTOR = sizeof(X) == 2 && sizeof(R) == 2 ? 8 : 4;
  static constexpr int LANES = D / VECTOR % 32 == 0 ? 32 : 16;
  static constexpr int VECTORS = D / (VECTOR * LANES);
  static constexpr int ROWS_PER_WARP = 32 / LANES;
  static constexpr int ROWS_PER_BLOCK = WARPS * ROWS_PER_WARP;
  static_assert(VECTOR * LANES * VECTORS == D);
};

template <typename X, typename R, int D, bool ADD>
__global__ __launch_bounds__(THREADS) void forward_in_registers(RMSNormForward a, Weight weight, int64_t rows) {
  using L = Layout<X, R, D>;
  constexpr int N = L::VECTOR;
  const int lane = threadIdx.x % L::LANES;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * L::ROWS_PER_BLOCK + threadIdx.x / L::LANES;
  const bool inside = row < rows;
  float x[L::VECTORS][N] = {};
  if (inside) {
    const R* residual = static_cast<const R*>(a.residual.data) + row * a.residual.stride;
#pragma unroll
    for (int v = 0; v < L::VECTORS; ++v) load<R, N, Read::plain>(residual + (v * L::LANES + lane) * N, x[v]);
    if constexpr (ADD) {
      const X* branch = static_cast<const X*>(a.branch.data) + row * a.branch.stride;
      float y[L::VECTORS][N];
#pragma unroll
      for (int v = 0; v < L::VECTORS; ++v) load<X, N, Read::plain>(branch + (v * L::LANES + lane) * N, y[v]);
#pragma unroll
      for (int v = 0; v < L::VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < N; ++i) x[v][i] = rounded<R>(x[v][i] + y[v][i]);
      }
    }
  }
  float squares = 0;
#pragma unroll
  for (int v = 0; v < L::VECTORS; ++v) {
#pragma unroll
    for (int i = 0; i < N; ++i) squares += x[v][i] * x[v][i];
  }
  const float rstd = rsqrtf(sum_over_lanes<L::LANES>(squares) / D + a.eps);
  if (!inside) return;
  if (lane == 0) a.rstd[row] = rstd;
#pragma unroll
  for (int v = 0; v < L::VECTORS; ++v) {
    const int column = (v * L::LANES + lane) * N;
    if constexpr (ADD) store<R, N>(static_cast<R*>(a.sum) + row * D + column, x[v]);
    float w[N];
    weight.load<N>(column, w);
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] *= x[v][i] * rstd;
    store<X, N>(static_cast<X*>(a.normed) + row * D + column, w);
  }
}

template <typename X, typename R, bool ADD>
__global__ __launch_bounds__(THREADS) void forward_any(RMSNormForward a, Weight weight, int64_t rows, int64_t d) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (row >= rows) return;
  const R* residual = static_cast<const R*>(a.residual.data) + row * a.residual.stride;
  const X* branch = static_cast<const X*>(a.branch.data) + row * a.branch.stride;
  const auto at = [&](int64_t column) {
    const float x = to_float(residual[column]);
    return ADD ? rounded<R>(x + to_float(branch[column])) : x;
  };
  float squares = 0;
  for (int64_t c = lane; c < d; c += 32) squares += at(c) * at(c);
  const float rstd = rsqrtf(sum_over_lanes<32>(squares) / d + a.eps);
  if (lane == 0) a.rstd[row] = rstd;
  for (int64_t c = lane; c < d; c += 32) {
    const float x = at(c);
    float w[1];
    weight.load<1>(c, w);
    if constexpr (ADD) static_cast<R*>(a.sum)[row * d + c] = from_float<R>(x);
    static_cast<X*>(a.normed)[row * d + c] = from_float<X>(x * rstd * w[0]);
  }
}

template <typename X, typename R, int D, bool D_SUM>
__global__ __launch_bounds__(THREADS, BLOCKS_PER_SM) void backward_in_registers(RMSNormBackward a, Weight weight,
                                                                                int64_t rows) {
  using L = Layout<X, R, D>;
  constexpr int N = L::VECTOR;
  __shared__ __align__(16) float by_warp[WARPS][D];
  __shared__ float4 shared_weight[D / 4];  // registers are short: the weight is read anew in every turn
  const int lane = threadIdx.x % L::LANES;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * L::ROWS_PER_BLOCK + threadIdx.x / L::LANES;
  const int64_t step = static_cast<int64_t>(gridDim.x) * L::ROWS_PER_BLOCK;
  float d_weight[L::VECTORS][N] = {};
  // Neighbouring lanes read neighbouring float4s: no bank is asked twice.
  const auto weight_at = [](int v, int part, int of_lane) { return (v * N / 4 + part) * L::LANES + of_lane; };
  for (int i = threadIdx.x; i < D / 4; i += THREADS) {
    float w[4];
    weight.load<4>(4 * i, w);
    const int vector = i / (N / 4);
    shared_weight[weight_at(vector / L::LANES, i % (N / 4), vector % L::LANES)] = {w[0], w[1], w[2], w[3]};
  }
  __syncthreads();

  // All lanes of a warp make the same number of turns: the sums over lanes need every one of them.
  const int64_t turns = (rows + step - 1) / step;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t row = first + turn * step;
    const bool inside = row < rows;
    float g[L::VECTORS][N] = {}, x[L::VECTORS][N] = {}, s[L::VECTORS][N] = {};
    float rstd = 0;
    if (inside) {
      const X* d_normed = static_cast<const X*>(a.d_normed.data) + row * a.d_normed.stride;
      const R* x_row = static_cast<const R*>(a.x.data) + row * a.x.stride;
#pragma unroll
      for (int v = 0; v < L::VECTORS; ++v) load<X, N, Read::plain>(d_normed + (v * L::LANES + lane) * N, g[v]);
#pragma unroll
      for (int v = 0; v < L::VECTORS; ++v) load<R, N, Read::plain>(x_row + (v * L::LANES + lane) * N, x[v]);
      if constexpr (D_SUM) {
        const R* d_sum = static_cast<const R*>(a.d_sum.data) + row * a.d_sum.stride;
#pragma unroll
        for (int v = 0; v < L::VECTORS; ++v) load<R, N, Read::plain>(d_sum + (v * L::LANES + lane) * N, s[v]);
      }
      rstd = a.rstd[row];
    }
    float dot = 0;
#pragma unroll
    for (int v = 0; v < L::VECTORS; ++v) {
#pragma unroll
      for (int part = 0; part < N / 4; ++part) {
        const float4 four = shared_weight[weight_at(v, part, lane)];
        const float w[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = 4 * part + j;
          d_weight[v][i] += g[v][i] * (x[v][i] * rstd);
          g[v][i] *= w[j];
          dot += g[v][i] * x[v][i];
        }
      }
    }
    const float along = sum_over_lanes<L::LANES>(dot) * (1.0f / D) * rstd * rstd;
    if (!inside) continue;
#pragma unroll
    for (int v = 0; v < L::VECTORS; ++v) {
      const int64_t at = row * D + (v * L::LANES + lane) * N;
#pragma unroll
      for (int i = 0; i < N; ++i) s[v][i] += rstd * (g[v][i] - x[v][i] * along);
      store<R, N>(static_cast<R*>(a.d_x) + at, s[v]);
      if constexpr (sizeof(X) != sizeof(R)) {
        if (a.d_branch != nullptr) store<X, N>(static_cast<X*>(a.d_branch) + at, s[v]);
      }
    }
  }

#pragma unroll
  for (int v = 0; v < L::VECTORS; ++v) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (L::LANES == 16) d_weight[v][i] += __shfl_xor_sync(ALL_LANES, d_weight[v][i], 16);
    }
    if (threadIdx.x % 32 < L::LANES) {
      float* p = &by_warp[threadIdx.x / 32][(v * L::LANES + lane) * N];
#pragma unroll
      for (int i = 0; i < N; ++i) p[i] = d_weight[v][i];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < D; c += THREADS) {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += by_warp[warp][c];
    a.partials[static_cast<int64_t>(blockIdx.x) * D + c] = total;
  }
}

template <typename X, typename R>
__global__ __launch_bounds__(THREADS) void backward_any(RMSNormBackward a, Weight weight, int64_t rows, int64_t d) {
  extern __shared__ float d_weight[];  // [d]; a thread owns the columns threadIdx.x + i * THREADS
  __shared__ float by_warp[WARPS];
  for (int64_t c = threadIdx.x; c < d; c += THREADS) d_weight[c] = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const X* d_normed = static_cast<const X*>(a.d_normed.data) + row * a.d_normed.stride;
    const R* x_row = static_cast<const R*>(a.x.data) + row * a.x.stride;
    const R* d_sum = static_cast<const R*>(a.d_sum.data);
    if (d_sum != nullptr) d_sum += row * a.d_sum.stride;
    const float rstd = a.rstd[row];
    float dot = 0;
    for (int64_t c = threadIdx.x; c < d; c += THREADS) {
      float w[1];
      weight.load<1>(c, w);
      dot += to_float(d_normed[c]) * w[0] * to_float(x_row[c]);
    }
    dot = sum_over_lanes<32>(dot);
    if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = dot;
    __syncthreads();
    dot = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) dot += by_warp[warp];
    __syncthreads();
    const float along = dot / d * rstd * rstd;
    for (int64_t c = threadIdx.x; c < d; c += THREADS) {
      float w[1];
      weight.load<1>(c, w);
      const float g = to_float(d_normed[c]), x = to_float(x_row[c]);
      d_weight[c] += g * (x * rstd);
      const float d_x = rstd * (g * w[0] - x * along) + (d_sum == nullptr ? 0.0f : to_float(d_sum[c]));
      static_cast<R*>(a.d_x)[row * d + c] = from_float<R>(d_x);
      if (a.d_branch != nullptr) static_cast<X*>(a.d_branch)[row * d + c] = from_float<X>(d_x);
    }
  }
  for (int64_t c = threadIdx.x; c < d; c += THREADS) a.partials[blockIdx.x * d + c] = d_weight[c];
}

// Column sums of the partials: 32 columns a block, 8 threads a column, always in the same order.
__global__ __launch_bounds__(THREADS) void add_partials(const float* partials, int64_t count, int64_t d, void* out,
                                                        bool out_bf16) {
  __shared__ float part[WARPS][32];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const int group = threadIdx.x / 32;
  float total = 0;
  if (column < d) {
#pragma unroll 4
    for (int64_t p = group; p < count; p += WARPS) total += partials[p * d + column];
  }
  part[group][threadIdx.x % 32] = total;
  __syncthreads();
  if (group != 0 || column >= d) return;
#pragma unroll
  for (int g = 1; g < WARPS; ++g) total += part[g][threadIdx.x];
  if (out_bf16) {
    static_cast<bf16*>(out)[column] = from_float<bf16>(total);
  } else {
    static_cast<float*>(out)[column] = total;
  }
}

// Whether every row begins at a multiple of 16 bytes.
bool vectors(const Rows& rows, Type type) {
  const int64_t size = type == Type::bfloat16 ? 2 : 4;
  return rows.data == nullptr || (aligned(rows.data, 16) && rows.stride * size % 16 == 0);
}

template <typename X, typename R, int D>
cudaError_t forward_fast(const RMSNormForward& a, Weight weight, int64_t rows, cudaStream_t stream) {
  constexpr int per_block = Layout<X, R, D>::ROWS_PER_BLOCK;
  const auto grid = static_cast<unsigned>((rows + per_block - 1) / per_block);
  if (a.branch.data != nullptr) {
    forward_in_registers<X, R, D, true><<<grid, THREADS, 0, stream>>>(a, weight, rows);
  } else {
    forward_in_registers<X, R, D, false><<<grid, THREADS, 0, stream>>>(a, weight, rows);
  }
  return cudaGetLastError();
}

template <typename X, typename R>
cudaError_t forward_typed(const RMSNormForward& a, Weight weight, int64_t rows, int64_t d, Type type,
                          Type residual_type, cudaStream_t stream) {
  if (aligned(a.weight, 16) && vectors(a.branch, type) && vectors(a.residual, residual_type)) {
    if (d == 384) return forward_fast<X, R, 384>(a, weight, rows, stream);
    if (d == 512) return forward_fast<X, R, 512>(a, weight, rows, stream);
    if (d == 768) return forward_fast<X, R, 768>(a, weight, rows, stream);
  }
  const auto grid = static_cast<unsigned>((rows + WARPS - 1) / WARPS);
  if (a.branch.data != nullptr) {
    forward_any<X, R, true><<<grid, THREADS, 0, stream>>>(a, weight, rows, d);
  } else {
    forward_any<X, R, false><<<grid, THREADS, 0, stream>>>(a, weight, rows, d);
  }
  return cudaGetLastError();
}

template <typename X, typename R, int D>
cudaError_t backward_fast(const RMSNormBackward& a, Weight weight, int64_t rows, unsigned grid, cudaStream_t stream) {
  if (a.d_sum.data != nullptr) {
    backward_in_registers<X, R, D, true><<<grid, THREADS, 0, stream>>>(a, weight, rows);
  } else {
    backward_in_registers<X, R, D, false><<<grid, THREADS, 0, stream>>>(a, weight, rows);
  }
  return cudaGetLastError();
}

template <typename X, typename R>
cudaError_t backward_typed(const RMSNormBackward& a, Weight weight, int64_t rows, int64_t d, Type type,
                           Type residual_type, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(rms_norm_partials(rows));
  if (aligned(a.weight, 16) && vectors(a.d_normed, type) && vectors(a.x, residual_type) &&
      vectors(a.d_sum, residual_type)) {
    if (d == 384) return backward_fast<X, R, 384>(a, weight, rows, grid, stream);
    if (d == 512) return backward_fast<X, R, 512>(a, weight, rows, grid, stream);
    if (d == 768) return backward_fast<X, R, 768>(a, weight, rows, grid, stream);
  }
  const auto shared = static_cast<int>(d * sizeof(float));
  const cudaError_t error =
      cudaFuncSetAttribute(backward_any<X, R>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  backward_any<X, R><<<grid, THREADS, shared, stream>>>(a, weight, rows, d);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rms_norm_forward(const RMSNormForward& a, int64_t rows, int64_t d, Type type, Type residual_type,
                             Type weight_type, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  const Weight weight = {a.weight, weight_type == Type::bfloat16};
  if (type == Type::float32) return forward_typed<float, float>(a, weight, rows, d, type, residual_type, stream);
  if (residual_type == Type::float32) {
    return forward_typed<bf16, float>(a, weight, rows, d, type, residual_type, stream);
  }
  return forward_typed<bf16, bf16>(a, weight, rows, d, type, residual_type, stream);
}

int64_t rms_norm_partials(int64_t rows) {
  // A block takes at least 8 rows a turn; small batches leave fewer partials.
  const int64_t wanted = (rows + WARPS - 1) / WARPS;
  const int64_t most = static_cast<int64_t>(multiprocessors()) * BLOCKS_PER_SM;
  return wanted < most ? wanted : most;
}

cudaError_t rms_norm_backward(const RMSNormBackward& a, int64_t rows, int64_t d, Type type, Type residual_type,
                              Type weight_type, cudaStream_t stream) {
  const Weight weight = {a.weight, weight_type == Type::bfloat16};
  cudaError_t error = cudaSuccess;
  if (rows > 0) {
    if (type == Type::float32) {
      error = backward_typed<float, float>(a, weight, rows, d, type, residual_type, stream);
    } else if (residual_type == Type::float32) {
      error = backward_typed<bf16, float>(a, weight, rows, d, type, residual_type, stream);
    } else {
      error = backward_typed<bf16, bf16>(a, weight, rows, d, type, residual_type, stream);
    }
  }
  if (error != cudaSuccess || d == 0) return error;
  const auto grid = static_cast<unsigned>((d + 31) / 32);
  add_partials<<<grid, THREADS, 0, stream>>>(a.partials, rms_norm_partials(rows), d, a.d_weight, weight.is_bf16);
  return cudaGetLastError();
}

}  // namespace mtlm
