// RMSNorm with the residual addition before it (Zhang and Sennrich 2019).
//
//   sum = residual + branch        rstd = 1 / sqrt(mean(sum^2) + eps)        normed = sum * rstd * weight
//
// backward, with g = weight * d_normed:
//   d_x = rstd * g - sum * rstd^3 * mean(g * sum) + d_sum        (the gradient of residual and of branch alike)
//   d_weight = column sums of d_normed * sum * rstd
//
// Saved: sum (which the network keeps anyway) and rstd [rows]. Statistics are float32, of the sum as it is
// rounded in memory. Bytes per row of d: forward 8d in bfloat16 (12d with a float32 residual), backward 8d (16d).
//
// For the widths of WIDTHS a quarter of a warp to a warp holds a row in registers: one pass over memory. Backward: a
// grid of fixed size walks over the rows, each thread adds up its columns of d_weight in float32 registers, a
// block leaves one row of partials, and a second small kernel adds those in order. No atomics: the result
// depends on the inputs and the number of multiprocessors alone, and a row's results on that row alone.
// Other sizes and unaligned rows take plain loops.
#include "partials.cuh"

namespace mtlm {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int BLOCKS_PER_SM = 2;  // of the backward grid: registers for two blocks of 256 threads
// Head sizes of the models that norm queries and keys, and widths of models: 384, 512 and 768 of ours, the rest those of
// SmolLM2 and Qwen3. (Of 896, Qwen2.5's, one instance spills.)
#define WIDTHS 64, 128, 384, 512, 576, 768, 960, 1024

// A matrix whose rows are contiguous inside; `stride` elements from row to row.
struct Rows {
  const void* data;
  int64_t stride;
};

struct Forward {
  Rows branch;          // [rows, d] of the output's type; null for the norm alone, of `residual`
  Rows residual;        // [rows, d] of the residual's type
  const void* weight;   // [d]
  float eps;
  void* normed;         // [rows, d] of the output's type
  void* sum;            // [rows, d] of the residual's type; null for the norm alone
  float* rstd;          // [rows]
};

struct Backward {
  Rows d_normed;        // [rows, d]
  Rows d_sum;           // [rows, d] of x's type, or null
  Rows x;               // [rows, d]: what was normalised
  const float* rstd;    // [rows]
  const void* weight;   // [d]
  void* d_x;            // [rows, d] of x's type
  void* d_branch;       // the same in d_normed's type, or null
  float* partials;      // [blocks, d]
  void* d_weight;       // [d]
};

// How a row of D elements lies in the lanes: vectors of 16 bytes of the wider type, one after another. Of a width that
// no number of lanes divides, some have one vector fewer.
template <typename X, typename R, int D>
struct Layout {
  static constexpr int VECTOR = sizeof(X) == 2 && sizeof(R) == 2 ? 8 : 4;
  static constexpr int CHUNKS = D / VECTOR;
  static constexpr bool NARROW = CHUNKS % 32 != 0 && CHUNKS % 16 == 0 && CHUNKS / 16 * VECTOR <= 24;
  static constexpr int LANES = CHUNKS == 8 ? 8 : NARROW ? 16 : 32;
  static constexpr int VECTORS = (CHUNKS + LANES - 1) / LANES;
  static constexpr int ROWS_PER_WARP = 32 / LANES;
  static constexpr int ROWS_PER_BLOCK = WARPS * ROWS_PER_WARP;
  static_assert(D % VECTOR == 0);

  static __device__ __forceinline__ constexpr bool has(int vector, int lane) {
    return CHUNKS % LANES == 0 || vector * LANES + lane < CHUNKS;
  }
};

template <typename X, typename R, int D, bool ADD>
__global__ __launch_bounds__(THREADS) void forward_in_registers(Forward a, Weight weight, int64_t rows) {
  using L = Layout<X, R, D>;
  constexpr int N = L::VECTOR;
  const int lane = threadIdx.x % L::LANES;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * L::ROWS_PER_BLOCK + threadIdx.x / L::LANES;
  const bool inside = row < rows;
  float x[L::VECTORS][N] = {};
  if (inside) {
    const R* residual = static_cast<const R*>(a.residual.data) + row * a.residual.stride;
#pragma unroll
    for (int v = 0; v < L::VECTORS; ++v) {
      if (L::has(v, lane)) load<R, N, Read::plain>(residual + (v * L::LANES + lane) * N, x[v]);
    }
    if constexpr (ADD) {
      const X* branch = static_cast<const X*>(a.branch.data) + row * a.branch.stride;
      float y[L::VECTORS][N] = {};
#pragma unroll
      for (int v = 0; v < L::VECTORS; ++v) {
        if (L::has(v, lane)) load<X, N, Read::plain>(branch + (v * L::LANES + lane) * N, y[v]);
      }
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
    if (!L::has(v, lane)) continue;
    if constexpr (ADD) store<R, N>(static_cast<R*>(a.sum) + row * D + column, x[v]);
    float w[N];
    weight.load<N>(column, w);
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] *= x[v][i] * rstd;
    store<X, N>(static_cast<X*>(a.normed) + row * D + column, w);
  }
}

template <typename X, typename R, bool ADD>
__global__ __launch_bounds__(THREADS) void forward_any(Forward a, Weight weight, int64_t rows, int64_t d) {
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
__global__ __launch_bounds__(THREADS, D <= 768 ? BLOCKS_PER_SM : 1) void backward_in_registers(
    Backward a, Weight weight, int64_t rows) {
  using L = Layout<X, R, D>;
  constexpr int N = L::VECTOR;
  __shared__ __align__(16) float warp_sums[WARPS][D];
  constexpr int FOURS = L::VECTORS * L::LANES * N / 4;
  __shared__ float4 shared_weight[FOURS];  // registers are short: the weight is read anew in every turn
  const int lane = threadIdx.x % L::LANES;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * L::ROWS_PER_BLOCK + threadIdx.x / L::LANES;
  const int64_t step = static_cast<int64_t>(gridDim.x) * L::ROWS_PER_BLOCK;
  float d_weight[L::VECTORS][N] = {};
  // Neighbouring lanes read neighbouring float4s: no bank is asked twice.
  const auto weight_at = [](int v, int part, int of_lane) { return (v * N / 4 + part) * L::LANES + of_lane; };
  for (int i = threadIdx.x; i < FOURS; i += THREADS) {
    float w[4] = {};
    if (4 * i < D) weight.load<4>(4 * i, w);
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
      for (int v = 0; v < L::VECTORS; ++v) {
        if (L::has(v, lane)) load<X, N, Read::plain>(d_normed + (v * L::LANES + lane) * N, g[v]);
      }
#pragma unroll
      for (int v = 0; v < L::VECTORS; ++v) {
        if (L::has(v, lane)) load<R, N, Read::plain>(x_row + (v * L::LANES + lane) * N, x[v]);
      }
      if constexpr (D_SUM) {
        const R* d_sum = static_cast<const R*>(a.d_sum.data) + row * a.d_sum.stride;
#pragma unroll
        for (int v = 0; v < L::VECTORS; ++v) {
          if (L::has(v, lane)) load<R, N, Read::plain>(d_sum + (v * L::LANES + lane) * N, s[v]);
        }
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
    const float projection = sum_over_lanes<L::LANES>(dot) * (1.0f / D) * rstd * rstd;
    if (!inside) continue;
#pragma unroll
    for (int v = 0; v < L::VECTORS; ++v) {
      if (!L::has(v, lane)) continue;
      const int64_t at = row * D + (v * L::LANES + lane) * N;
#pragma unroll
      for (int i = 0; i < N; ++i) s[v][i] += rstd * (g[v][i] - x[v][i] * projection);
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
#pragma unroll
      for (int offset = L::LANES; offset < 32; offset *= 2) {
        d_weight[v][i] += __shfl_xor_sync(ALL_LANES, d_weight[v][i], offset);
      }
    }
    if (threadIdx.x % 32 < L::LANES && L::has(v, lane)) {
      float* p = &warp_sums[threadIdx.x / 32][(v * L::LANES + lane) * N];
#pragma unroll
      for (int i = 0; i < N; ++i) p[i] = d_weight[v][i];
    }
  }
  __syncthreads();
  for (int c = threadIdx.x; c < D; c += THREADS) {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += warp_sums[warp][c];
    a.partials[static_cast<int64_t>(blockIdx.x) * D + c] = total;
  }
}

template <typename X, typename R>
__global__ __launch_bounds__(THREADS) void backward_any(Backward a, Weight weight, int64_t rows, int64_t d) {
  extern __shared__ float d_weight[];  // [d]; a thread owns the columns threadIdx.x + i * THREADS
  __shared__ float warp_sums[WARPS];
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
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = dot;
    __syncthreads();
    dot = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) dot += warp_sums[warp];
    __syncthreads();
    const float projection = dot / d * rstd * rstd;
    for (int64_t c = threadIdx.x; c < d; c += THREADS) {
      float w[1];
      weight.load<1>(c, w);
      const float g = to_float(d_normed[c]), x = to_float(x_row[c]);
      d_weight[c] += g * (x * rstd);
      const float d_x = rstd * (g * w[0] - x * projection) + (d_sum == nullptr ? 0.0f : to_float(d_sum[c]));
      static_cast<R*>(a.d_x)[row * d + c] = from_float<R>(d_x);
      if (a.d_branch != nullptr) static_cast<X*>(a.d_branch)[row * d + c] = from_float<X>(d_x);
    }
  }
  for (int64_t c = threadIdx.x; c < d; c += THREADS) a.partials[blockIdx.x * d + c] = d_weight[c];
}

// Whether every row begins at a multiple of 16 bytes.
bool vectors(const Rows& rows, Type type) {
  const int64_t size = type == Type::bfloat16 ? 2 : 4;
  return rows.data == nullptr || (aligned(rows.data, 16) && rows.stride * size % 16 == 0);
}

// Calls run(x, r, width): values of the two types, and the width of the instance that holds a row in registers, 0 of
// the one for any width.
template <typename Run>
void dispatch_norm(Type type, Type residual_type, bool whole, int64_t d, Run run) {
  const auto of_types = [&](auto x, auto r) {
    const auto of_width = [&](auto width) { run(x, r, width); };
    if (!whole || !dispatch<WIDTHS>(d, of_width)) of_width(std::integral_constant<int, 0>());
  };
  if (type == Type::float32) {
    of_types(float(), float());
  } else if (residual_type == Type::float32) {
    of_types(bf16(), float());
  } else {
    of_types(bf16(), bf16());
  }
}

Weight weight_of(const View& weight, const View& like, int64_t d) {
  check(weight, "weight", like, {d});
  check_rows_contiguous(weight, "weight");
  return {weight.data, float_type(weight, "weight") == Type::bfloat16};
}

Rows rows_of(const View& t, const char* name, const View& like, Type type) {
  check(t, name, like, {like.sizes[0], like.sizes[1]});
  check_rows_contiguous(t, name);
  REQUIRE(t.type == type, name, " must be ", name_of(type), ", not ", name_of(t.type));
  return {t.data, t.strides[0]};
}

// What the norm's input and output types can be: alike, or a float32 residual with bfloat16.
void check_types(Type type, Type residual, const char* op) {
  REQUIRE(type == residual || residual == Type::float32, "mtlm::", op,
          ": a bfloat16 residual with a float32 branch or output is not supported");
}

cudaError_t forward(cudaStream_t stream, Forward a, const View& residual, const View& weight, double eps,
                    const Out& normed, const Out& rstd) {
  const int64_t rows = residual.sizes[0], d = residual.sizes[1];
  const Type type = normed.type, residual_type = residual.type;
  const Weight w = weight_of(weight, residual, d);
  check(normed, "normed", residual, {rows, d}, type);
  check(rstd, "rstd", residual, {rows}, Type::float32);
  if (rows == 0) return cudaSuccess;
  a.residual = rows_of(residual, "residual", residual, residual_type);
  a.weight = weight.data, a.eps = static_cast<float>(eps);
  a.normed = normed.out(), a.rstd = rstd.out<float>();
  const bool whole = aligned(a.weight, 16) && aligned(a.normed, 16) && aligned(a.sum, 16) && vectors(a.branch, type) &&
                     vectors(a.residual, residual_type);
  dispatch_norm(type, residual_type, whole, d, [&](auto x, auto r, auto width) {
    using X = decltype(x);
    using R = decltype(r);
    constexpr int D = decltype(width)::value;
    dispatch<false, true>(a.branch.data != nullptr, [&](auto add) {
      constexpr bool ADD = decltype(add)::value;
      if constexpr (D > 0) {
        constexpr int per_block = Layout<X, R, D>::ROWS_PER_BLOCK;
        const auto grid = static_cast<unsigned>((rows + per_block - 1) / per_block);
        forward_in_registers<X, R, D, ADD><<<grid, THREADS, 0, stream>>>(a, w, rows);
      } else {
        const auto grid = static_cast<unsigned>((rows + WARPS - 1) / WARPS);
        forward_any<X, R, ADD><<<grid, THREADS, 0, stream>>>(a, w, rows, d);
      }
    });
  });
  return cudaGetLastError();
}

}  // namespace

cudaError_t rms_norm_into(cudaStream_t stream, View x, View weight, double eps, Out normed, Out rstd) {
  check_matrix(x, "x");
  check_types(float_type(normed, "dtype"), float_type(x, "x"), "rms_norm");
  return forward(stream, {}, x, weight, eps, normed, rstd);
}

cudaError_t add_rms_norm_into(cudaStream_t stream, View residual, View branch, View weight, double eps, Out normed,
                              Out sum, Out rstd) {
  check_matrix(residual, "residual");
  const int64_t rows = residual.sizes[0], d = residual.sizes[1];
  const Type type = float_type(branch, "branch");
  check_types(type, float_type(residual, "residual"), "add_rms_norm");
  Forward a = {};
  a.branch = rows_of(branch, "branch", residual, type);
  check(normed, "normed", residual, {rows, d}, type);
  check(sum, "sum", residual, {rows, d}, residual.type);
  a.sum = sum.out();
  return forward(stream, a, residual, weight, eps, normed, rstd);
}

cudaError_t rms_norm_backward_into(cudaStream_t stream, View d_normed, std::optional<View> d_sum, View x, View rstd,
                                   View weight, Out d_x, Out d_branch, Out d_weight, Out partials) {
  check_matrix(x, "x");
  const int64_t rows = x.sizes[0], d = x.sizes[1];
  const Type type = float_type(d_normed, "d_normed"), residual_type = float_type(x, "x");
  check_types(type, residual_type, "rms_norm_backward");
  const Weight w = weight_of(weight, x, d);
  const bool two = d_branch.sizes[0] > 0;
  REQUIRE(!two || type != residual_type, "d_branch must be empty where its type is that of x");
  check(rstd, "rstd", x, {rows}, Type::float32);
  check(d_x, "d_x", x, {rows, d}, residual_type);
  check(d_branch, "d_branch", x, {two ? rows : 0, d}, type);
  check(d_weight, "d_weight", x, {d}, weight.type);
  const int64_t blocks = partials.sizes[0];
  check(partials, "partials", x, {blocks, d}, Type::float32);
  REQUIRE(blocks > 0 || rows == 0, "partials must have a row for each block, at least one");
  const Rows none = {nullptr, 0};
  const Backward a = {rows_of(d_normed, "d_normed", x, type),
                      d_sum ? rows_of(*d_sum, "d_sum", x, residual_type) : none,
                      rows_of(x, "x", x, residual_type), rstd.as<float>(), weight.data, d_x.out(),
                      two ? d_branch.out() : nullptr, partials.out<float>(), d_weight.out()};
  const bool whole = aligned(a.weight, 16) && aligned(a.d_x, 16) && aligned(a.d_branch, 16) &&
                     vectors(a.d_normed, type) && vectors(a.x, residual_type) && vectors(a.d_sum, residual_type);
  const auto grid = static_cast<unsigned>(blocks);
  cudaError_t error = cudaSuccess;
  const auto launch = [&](auto x, auto r, auto width) {
    using X = decltype(x);
    using R = decltype(r);
    constexpr int D = decltype(width)::value;
    if constexpr (D > 0) {
      dispatch<false, true>(a.d_sum.data != nullptr, [&](auto has_d_sum) {
        backward_in_registers<X, R, D, decltype(has_d_sum)::value><<<grid, THREADS, 0, stream>>>(a, w, rows);
      });
    } else {
      const auto shared = static_cast<int>(d * sizeof(float));
      error = launch_with_shared(backward_any<X, R>, grid, THREADS, shared, stream, a, w, rows, d);
    }
  };
  if (rows > 0) dispatch_norm(type, residual_type, whole, d, launch);
  if (error == cudaSuccess) error = cudaGetLastError();
  if (error != cudaSuccess || d == 0) return error;
  return launch_add_partials<WARPS>(stream, a.partials, rows > 0 ? blocks : 0, d, a.d_weight, w.is_bf16);
}

}  // namespace mtlm
