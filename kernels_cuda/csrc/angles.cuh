// cos and sin of rotary embeddings: how launchers check them, and how a pair of elements is turned.
#pragma once

#include "op.h"

namespace mtlm {

struct Angles {
  const float* cos;  // [batch, seq, head size / 2]; null: nothing is rotated
  const float* sin;
  int64_t batch;     // 1 of all sequences, or one for each
};

// Elements i and i + K/2 of a head, turned. Which product an fma takes in is said here: left to the compiler, kernels
// of other shapes may differ in bits.
__device__ __forceinline__ float2 turned(float a, float b, float cos, float sin) {
  return {__fmaf_rn(a, cos, -__fmul_rn(b, sin)), __fmaf_rn(b, cos, __fmul_rn(a, sin))};
}

// q: [batch, seq, heads, head size]
inline Angles checked_angles(const std::optional<View>& cos, const std::optional<View>& sin, const View& q) {
  REQUIRE(cos.has_value() == sin.has_value(), "cos and sin must be given both, or none");
  if (!cos) return {};
  const int64_t batch = q.sizes[0], seq = q.sizes[1], half = q.sizes[3] / 2;
  const int64_t own = cos->dims == 3 ? cos->sizes[0] : 0;
  REQUIRE(own == 1 || own == batch, "cos must be [1 or ", batch, ", ", seq, ", ", half, "], not ", shape(*cos));
  check(*cos, "cos", q, {own, seq, half}, Type::float32);
  check(*sin, "sin", q, {own, seq, half}, Type::float32);
  return {cos->as<float>(), sin->as<float>(), own};
}

}  // namespace mtlm
