// Parts of the epilogues of products (product.cuh): how a warp's results leave by way of its staging, and what the
// launchers check and describe.
#pragma once

#include "product.cuh"

namespace mtlm::hopper {

__device__ __forceinline__ float2 unpack_bf16(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}

// To column x and row y of a matrix go 16 x 64 results, by the next of the epilogue's pieces: value(i) is a pair of
// neighbours, four pairs for each two of the eight chunks of 16 bytes that `place` takes together.
template <typename E, typename Value>
__device__ __forceinline__ void store(E& epilogue, const CUtensorMap* map, int x, int y, Value value) {
  const uint32_t piece = epilogue.pieces + epilogue.written++ % E::PIECES * PIECE_BYTES;
  if (epilogue.lane == 0) wait_for_stores_to_read<E::PIECES - 1>();
  __syncwarp();
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    uint32_t m[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) m[i] = value(4 * q + i);
    store_matrices(place(piece, q, epilogue.lane), m);
  }
  publish_to_copy_engine();
  __syncwarp();
  if (epilogue.lane == 0) {
    store_box(map, piece, x, y);
    commit_stores();
  }
}

// ---- the host's side

inline void check_operand(const View& t, const char* name, const View& like, std::initializer_list<int64_t> sizes) {
  check(t, name, like, sizes, Type::bfloat16);
  REQUIRE(aligned(t.data, 16), name, " must begin at a multiple of 16 bytes");
}

inline void check_widths(int64_t inner, int64_t width) {
  REQUIRE(inner > 0 && width > 0 && inner % 8 == 0 && width % 8 == 0, "widths must be multiples of 8, not ", inner,
          " and ", width);
}

// PyTorch keeps a linear map as [outputs, inputs], JAX as [inputs, outputs].
inline void check_matrix_of(const View& t, const char* name, const View& like, int64_t outputs, int64_t inputs,
                            bool inputs_first) {
  if (inputs_first) std::swap(outputs, inputs);
  check_operand(t, name, like, {outputs, inputs});
}

// Weights of one matrix: [width, inner], or BY_COLUMNS [inner, width].
inline CUtensorMap describe_weights(const View& t, int64_t width, int64_t inner, bool by_columns) {
  return by_columns ? describe_matrix(t.data, inner, width, width, K_BLOCK / PAIR)
                    : describe_matrix(t.data, width, inner, inner, TILE / PAIR);
}

// A matrix that an epilogue reads or writes.
inline CUtensorMap describe_results(const View& t) {
  return describe_matrix(t.data, t.sizes[0], t.sizes[1], t.sizes[1], PIECE_ROWS);
}

}  // namespace mtlm::hopper
