// The products around SwiGLU with its formula, and with its gradient, in their epilogues. Hopper only.
//
//   swiglu_product           [gate, up] = x weight^T     h = silu(gate) up
//   swiglu_product_backward  d_h = d down     [d_gate, d_up] = d_h times SwiGLU's derivatives     h once more
//
// On its own the formula reads two and writes one matrix of N x F; its gradient reads three and writes three. Here the
// forward pass reads none, and the backward pass neither writes nor reads h's gradient. What cublasLt takes for the
// same products is in docs/LOG.md.
#include "epilogue.cuh"

namespace mtlm {
namespace swiglu {  // not unnamed: for other architectures kernels are empty, and nothing here is used

using namespace hopper;

// The forward pass writes the first three; the backward pass reads gate and up and writes the others.
struct Matrices {
  CUtensorMap gate, up, h, d_gate, d_up;
};

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

// silu(gate) up of two neighbours, from what memory holds, so that both passes give the same bits.
__device__ __forceinline__ uint32_t formula(uint32_t gates, uint32_t ups) {
  const float2 g = unpack_bf16(gates), u = unpack_bf16(ups);
  return pack_bf16(g.x * sigmoid(g.x) * u.x, g.y * sigmoid(g.y) * u.y);
}

// A tile is 64 columns of gate and the same of up.
struct Forward {
  using Results = Matrices;
  static constexpr int STAGES = 5, PIECES = 4, BARRIERS = 0, N = 64, HALVES = 2;
  uint32_t pieces, barriers;
  int lane, written = 0;

  __device__ __forceinline__ void begin(const Matrices&, int, int) {}

  __device__ __forceinline__ void finish(const Matrices& maps, int tile, int row, const float (&sums)[M_BLOCKS][64]) {
#pragma unroll
    for (int block = 0; block < M_BLOCKS; ++block) {
      uint32_t gate[16], up[16];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        gate[i] = pack_bf16(sums[block][2 * i], sums[block][2 * i + 1]);
        up[i] = pack_bf16(sums[block][32 + 2 * i], sums[block][32 + 2 * i + 1]);
      }
      const int x = tile * N, y = row + block * 64;
      store(*this, &maps.gate, x, y, [&](int i) { return gate[i]; });
      store(*this, &maps.up, x, y, [&](int i) { return up[i]; });
      store(*this, &maps.h, x, y, [&](int i) { return formula(gate[i], up[i]); });
    }
  }
};

// A tile is 128 columns of h's gradient, gone through in four chunks of 16 x 64 per warp. Gate and up of the first two
// are loaded before the products, and those of the others a chunk ahead; the gradients take their places.
struct Backward {
  using Results = Matrices;
  static constexpr int STAGES = 4, PIECES = 6, BARRIERS = 2, N = 128, HALVES = 1, CHUNKS = 2 * M_BLOCKS;
  uint32_t pieces, barriers;
  int lane;
  uint32_t taken = 0;  // chunks

  static __device__ __forceinline__ int column(int tile, int chunk) { return tile * N + chunk % 2 * 64; }
  static __device__ __forceinline__ int row_of(int row, int chunk) { return row + chunk / 2 * 64; }

  __device__ __forceinline__ void load(const Matrices& maps, int buffer, int x, int y) {
    const uint32_t to = pieces + buffer * 3 * PIECE_BYTES, barrier = barriers + 8 * buffer;
    expect_bytes(barrier, 2 * PIECE_BYTES);
    load_box(&maps.gate, to, barrier, x, y);
    load_box(&maps.up, to + PIECE_BYTES, barrier, x, y);
  }

  __device__ __forceinline__ void begin(const Matrices& maps, int tile, int row) {
    if (lane != 0) return;
    wait_for_stores_to_read<0>();
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int x = column(tile, chunk), y = row_of(row, chunk);
      if (chunk < 2) {
        load(maps, chunk, x, y);
      } else {
        prefetch_box(&maps.gate, x, y);
        prefetch_box(&maps.up, x, y);
      }
    }
  }

  __device__ __forceinline__ void finish(const Matrices& maps, int tile, int row, const float (&sums)[M_BLOCKS][64]) {
    __syncwarp();
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      const int buffer = chunk % 2, x = column(tile, chunk), y = row_of(row, chunk);
      if (chunk > 0 && chunk + 1 < CHUNKS && lane == 0) {
        wait_for_stores_to_read<0>();  // of the chunk before, whose place the next one takes
        load(maps, buffer ^ 1, column(tile, chunk + 1), row_of(row, chunk + 1));
      }
      wait(barriers + 8 * buffer, taken++ / 2 & 1);
      const uint32_t piece = pieces + buffer * 3 * PIECE_BYTES;
      const float* d = sums[chunk / 2] + chunk % 2 * 32;
      uint32_t gate[4][4], up[4][4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        load_matrices(place(piece, q, lane), gate[q]);
        load_matrices(place(piece + PIECE_BYTES, q, lane), up[q]);
      }
      __syncwarp();
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        uint32_t h[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          h[i] = formula(gate[q][i], up[q][i]);
          const float2 g = unpack_bf16(gate[q][i]), u = unpack_bf16(up[q][i]);
          const float d0 = d[8 * q + 2 * i], d1 = d[8 * q + 2 * i + 1], s0 = sigmoid(g.x), s1 = sigmoid(g.y);
          gate[q][i] = pack_bf16(d0 * u.x * s0 * (1.f + g.x * (1.f - s0)), d1 * u.y * s1 * (1.f + g.y * (1.f - s1)));
          up[q][i] = pack_bf16(d0 * g.x * s0, d1 * g.y * s1);
        }
        store_matrices(place(piece, q, lane), gate[q]);
        store_matrices(place(piece + PIECE_BYTES, q, lane), up[q]);
        store_matrices(place(piece + 2 * PIECE_BYTES, q, lane), h);
      }
      publish_to_copy_engine();
      __syncwarp();
      if (lane == 0) {
        store_box(&maps.d_gate, piece, x, y);
        store_box(&maps.d_up, piece + PIECE_BYTES, x, y);
        store_box(&maps.h, piece + 2 * PIECE_BYTES, x, y);
        commit_stores();
      }
    }
  }
};

// What both passes have, beside the weights.
template <typename E>
Maps<E> maps_of(const View& a, const View& gate_up, const View& h) {
  const int64_t rows = h.sizes[0], width = h.sizes[1], inner = a.sizes[1];
  Maps<E> maps{};
  maps.a = describe_matrix(a.data, rows, inner, inner, TILE);
  maps.results.gate = describe_matrix(gate_up.data, rows, width, 2 * width, PIECE_ROWS);
  maps.results.up = describe_matrix(gate_up.as<bf16>() + width, rows, width, 2 * width, PIECE_ROWS);
  maps.results.h = describe_results(h);
  return maps;
}

}  // namespace swiglu

using namespace swiglu;

// x [N, D], weight [2 F, D] (gate's rows, then up's; inputs_first: [D, 2 F]) -> gate_up [N, 2 F], h [N, F]
cudaError_t swiglu_product_into(cudaStream_t stream, View x, View weight, bool inputs_first, Out gate_up, Out h) {
  check_matrix(x, "x");
  check_matrix(weight, "weight");
  const int64_t rows = x.sizes[0], inner = x.sizes[1], width = weight.sizes[inputs_first] / 2;
  check_widths(inner, width);
  check_operand(x, "x", x, {rows, inner});
  check_matrix_of(weight, "weight", x, 2 * width, inner, inputs_first);
  check_operand(gate_up, "gate_up", x, {rows, 2 * width});
  check_operand(h, "h", x, {rows, width});
  if (rows == 0) return cudaSuccess;
  Maps<Forward> maps = maps_of<Forward>(x, gate_up, h);
  for (int i = 0; i < 2; ++i) {
    maps.weights[i] =
        inputs_first ? describe_matrix(weight.as<bf16>() + i * width, inner, width, 2 * width, K_BLOCK / PAIR)
                     : describe_matrix(weight.as<bf16>() + i * width * inner, width, inner, inner, TILE / PAIR);
  }
  return launch(stream, maps, inputs_first, rows, width, inner);
}

// d [N, D], down [D, F] (inputs_first: [F, D]), gate_up [N, 2 F] -> d_gate_up [N, 2 F], h [N, F]
cudaError_t swiglu_product_backward_into(cudaStream_t stream, View d, View down, bool inputs_first, View gate_up,
                                         Out d_gate_up, Out h) {
  check_matrix(d, "d");
  check_matrix(down, "down");
  const int64_t rows = d.sizes[0], inner = d.sizes[1], width = down.sizes[!inputs_first];
  check_widths(inner, width);
  check_operand(d, "d", d, {rows, inner});
  check_matrix_of(down, "down", d, inner, width, inputs_first);
  check_operand(gate_up, "gate_up", d, {rows, 2 * width});
  check_operand(d_gate_up, "d_gate_up", d, {rows, 2 * width});
  check_operand(h, "h", d, {rows, width});
  if (rows == 0) return cudaSuccess;
  Maps<Backward> maps = maps_of<Backward>(d, gate_up, h);
  maps.results.d_gate = describe_matrix(d_gate_up.data, rows, width, 2 * width, PIECE_ROWS);
  maps.results.d_up = describe_matrix(d_gate_up.as<bf16>() + width, rows, width, 2 * width, PIECE_ROWS);
  maps.weights[0] = describe_weights(down, width, inner, !inputs_first);
  return launch(stream, maps, !inputs_first, rows, width, inner);
}

}  // namespace mtlm
