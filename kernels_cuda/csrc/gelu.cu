// The products around GELU, in its tanh form, with its formula and its gradient in their epilogues. Hopper only.
//
//   gelu_product           up = x weight^T + bias     h = gelu(up)
//   gelu_product_backward  d_h = d down     d_up = d_h gelu'(up)     d_bias = column sums of d_up
//
// On its own the formula reads one and writes one matrix of N x F; its gradient reads two and writes one, which the
// bias's reads once more. Here the forward pass reads none, and the backward pass reads up and writes d_up alone. h is
// kept for the gradient of down's weight: to write it again costs as long as writing it, and these products take no
// longer than their own bytes do (docs/LOG.md).
//
// gelu(x) = x s with s = (1 + tanh u) / 2 = 1 / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3); the second form has
// no cancellation. gelu'(x) = s + x s (1 - s) 2 u'.
#include "epilogue.cuh"
#include "partials.cuh"

namespace mtlm {
namespace gelu {  // not unnamed: for other architectures kernels are empty, and nothing here is used

using namespace hopper;

constexpr float TWO_U = 1.5957691216057308f, CUBE = 0.044715f;
// Column sums of d_up are left by each warp for its rows of a tile; a pair's tiles have rows for all of its warps.
constexpr int PAIR_ROWS = PAIR * TILE, PAIR_PARTIALS = PAIR * WARPS / 2;

// s of x. The reciprocal as the hardware has it, to two units in the last place; e^(-2 u) may be infinite.
__device__ __forceinline__ float gate(float x) {
  const float power = power_of_two(x * fmaf(-TWO_U * CUBE * LOG2_E, x * x, -TWO_U * LOG2_E));
  float share;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(share) : "f"(1.f + power));
  return share;
}

__device__ __forceinline__ float derivative(float x) {
  const float s = gate(x);
  return fmaf(x * s * (1.f - s), fmaf(3 * TWO_U * CUBE, x * x, TWO_U), s);
}

struct Forward {
  struct Results {
    CUtensorMap up, h;
    const float* bias;
    int width;
  };
  static constexpr int STAGES = 5, PIECES = 4, BARRIERS = 0, N = TILE, HALVES = 1;
  uint32_t pieces, barriers;
  int lane, written = 0;
  float2 bias[N / 8];  // of the columns whose sums this lane has

  __device__ __forceinline__ void begin(const Results& results, int tile, int) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const int column = tile * N + 8 * j + lane % 4 * 2;
      bias[j] = column < results.width ? __ldg(reinterpret_cast<const float2*>(results.bias + column)) : float2{};
    }
  }

  __device__ __forceinline__ void finish(const Results& results, int tile, int row, const float (&sums)[M_BLOCKS][64]) {
#pragma unroll
    for (int chunk = 0; chunk < 2 * M_BLOCKS; ++chunk) {
      const float* own = sums[chunk / 2] + chunk % 2 * 32;
      uint32_t up[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float2 b = bias[chunk % 2 * 8 + i / 2];
        up[i] = pack_bf16(own[2 * i] + b.x, own[2 * i + 1] + b.y);
      }
      const int x = tile * N + chunk % 2 * 64, y = row + chunk / 2 * 64;
      store(*this, &results.up, x, y, [&](int i) { return up[i]; });
      store(*this, &results.h, x, y, [&](int i) {
        const float2 v = unpack_bf16(up[i]);  // what memory holds, of which the backward pass takes the gradient
        return pack_bf16(v.x * gate(v.x), v.y * gate(v.y));
      });
    }
  }
};

// A warp's 32 x 128 of up are loaded before the products, in four chunks of 16 x 64: a half of the columns, and of it
// the rows of each block of 64. d_up takes their places.
struct Backward {
  struct Results {
    CUtensorMap up, d_up;
    float* partials;
    int width;
  };
  static constexpr int STAGES = 5, PIECES = 2 * M_BLOCKS, BARRIERS = 1, N = TILE, HALVES = 1;
  uint32_t pieces, barriers;
  int lane;
  uint32_t turns = 0;

  __device__ __forceinline__ uint32_t piece_of(int half, int block) const {
    return pieces + (half * M_BLOCKS + block) * PIECE_BYTES;
  }

  __device__ __forceinline__ void begin(const Results& results, int tile, int row) {
    if (lane != 0) return;
    wait_for_stores_to_read<0>();  // of the tile before
    expect_bytes(barriers, PIECES * PIECE_BYTES);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int block = 0; block < M_BLOCKS; ++block) {
        load_box(&results.up, piece_of(half, block), barriers, tile * N + half * 64, row + block * 64);
      }
    }
  }

  __device__ __forceinline__ void finish(const Results& results, int tile, int row, const float (&sums)[M_BLOCKS][64]) {
    __syncwarp();
    wait(barriers, turns++ % 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float columns[16] = {};  // of 8 j + 2 (lane % 4) and the next: this lane's rows
#pragma unroll
      for (int block = 0; block < M_BLOCKS; ++block) {
        const uint32_t piece = piece_of(half, block);
        const float* d_h = sums[block] + half * 32;
        uint32_t up[4][4];
#pragma unroll
        for (int q = 0; q < 4; ++q) load_matrices(place(piece, q, lane), up[q]);
        __syncwarp();
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          uint32_t d_up[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float2 x = unpack_bf16(up[q][i]);
            const float d0 = d_h[8 * q + 2 * i] * derivative(x.x), d1 = d_h[8 * q + 2 * i + 1] * derivative(x.y);
            columns[4 * q + i / 2 * 2] += d0;
            columns[4 * q + i / 2 * 2 + 1] += d1;
            d_up[i] = pack_bf16(d0, d1);
          }
          store_matrices(place(piece, q, lane), d_up);
        }
        publish_to_copy_engine();
        __syncwarp();
        if (lane == 0) {
          store_box(&results.d_up, piece, tile * N + half * 64, row + block * 64);
          commit_stores();
        }
      }
      add_rows(columns);
      // Rows beyond the matrix have added zeros.
      const int column = tile * N + half * 64 + 2 * lane, partial = row / TILE * (WARPS / 2) + row % TILE / PIECE_ROWS;
      if (column < results.width) {
        float* to = results.partials + static_cast<int64_t>(partial) * results.width + column;
        *reinterpret_cast<float2*>(to) = {columns[0], columns[1]};
      }
    }
  }

  // Sums over the eight lanes that have the same columns: each gives away the half of its columns that the other keeps,
  // until the first two are those of 2 lane and the next.
  __device__ __forceinline__ void add_rows(float (&columns)[16]) const {
#pragma unroll
    for (int n = 8; n >= 2; n /= 2) {
      const bool upper = lane & (2 * n);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < n) {  // not the loop's bound, which would have to be known before the outer loop is unrolled
          const float given = upper ? columns[i] : columns[n + i], kept = upper ? columns[n + i] : columns[i];
          columns[i] = kept + __shfl_xor_sync(ALL_LANES, given, 2 * n);
        }
      }
    }
  }
};

}  // namespace gelu

using namespace gelu;

// x [N, D], weight [F, D] (inputs_first: [D, F]), bias [F] in float32 -> up [N, F], h [N, F]
cudaError_t gelu_product_into(cudaStream_t stream, View x, View weight, View bias, bool inputs_first, Out up, Out h) {
  check_matrix(x, "x");
  check_matrix(weight, "weight");
  const int64_t rows = x.sizes[0], inner = x.sizes[1], width = weight.sizes[inputs_first];
  check_widths(inner, width);
  check_operand(x, "x", x, {rows, inner});
  check_matrix_of(weight, "weight", x, width, inner, inputs_first);
  check(bias, "bias", x, {width}, Type::float32);
  REQUIRE(aligned(bias.data, 8), "bias must begin at a multiple of 8 bytes");
  check_operand(up, "up", x, {rows, width});
  check_operand(h, "h", x, {rows, width});
  if (rows == 0) return cudaSuccess;
  Maps<Forward> maps{};
  maps.a = describe_matrix(x.data, rows, inner, inner, TILE);
  maps.weights[0] = describe_weights(weight, width, inner, inputs_first);
  maps.results = {describe_results(up), describe_results(h), bias.as<float>(), static_cast<int>(width)};
  return launch(stream, maps, inputs_first, rows, width, inner);
}

// d [N, D], down [D, F] (inputs_first: [F, D]), up [N, F] -> d_up [N, F], d_bias [F] in float32;
// partials [PAIR_PARTIALS for every PAIR_ROWS rows, F] in float32 is room for its sums
cudaError_t gelu_product_backward_into(cudaStream_t stream, View d, View down, bool inputs_first, View up, Out d_up,
                                       Out d_bias, Out partials) {
  check_matrix(d, "d");
  check_matrix(down, "down");
  const int64_t rows = d.sizes[0], inner = d.sizes[1], width = down.sizes[!inputs_first];
  const int64_t count = (rows + PAIR_ROWS - 1) / PAIR_ROWS * PAIR_PARTIALS;
  check_widths(inner, width);
  check_operand(d, "d", d, {rows, inner});
  check_matrix_of(down, "down", d, inner, width, inputs_first);
  check_operand(up, "up", d, {rows, width});
  check_operand(d_up, "d_up", d, {rows, width});
  check(d_bias, "d_bias", d, {width}, Type::float32);
  check(partials, "partials", d, {count, width}, Type::float32);
  REQUIRE(aligned(partials.data, 8), "partials must begin at a multiple of 8 bytes");
  if (rows > 0) {
    Maps<Backward> maps{};
    maps.a = describe_matrix(d.data, rows, inner, inner, TILE);
    maps.weights[0] = describe_weights(down, width, inner, !inputs_first);
    maps.results = {describe_results(up), describe_results(d_up), partials.out<float>(), static_cast<int>(width)};
    const cudaError_t error = launch(stream, maps, !inputs_first, rows, width, inner);
    if (error != cudaSuccess) return error;
  }
  return launch_add_partials<32, 8>(stream, partials.as<float>(), count, width, d_bias.out(), false);
}

}  // namespace mtlm
