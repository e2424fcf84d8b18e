// The ids that a loss is to predict.
#pragma once

#include "common.cuh"

namespace mtlm {

// Ids [rows]: int64 as PyTorch has them, int32 as JAX does. -1 does not count.
struct Targets {
  const void* data;
  bool is_int64;

  __device__ __forceinline__ int64_t at(int64_t row) const {
    return is_int64 ? static_cast<const int64_t*>(data)[row] : static_cast<const int32_t*>(data)[row];
  }
};

inline Targets check_targets(const View& targets, const View& like, int64_t rows) {
  const bool is_int64 = targets.type == Type::int64;
  REQUIRE(is_int64 || targets.type == Type::int32, "targets must be int64, in JAX also int32, not ",
          name_of(targets.type));
  check(targets, "targets", like, {rows}, targets.type);
  return {targets.data, is_int64};
}

}  // namespace mtlm
