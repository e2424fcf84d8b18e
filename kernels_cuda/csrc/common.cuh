// Parts of every kernel: 16-byte accesses as floats, sums over lanes in a fixed order, the choice of an instance by
// what is known only at run time, the size of the device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <type_traits>

#include "op.h"

namespace mtlm {

using bf16 = __nv_bfloat16;

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;

// 2^x as the hardware has it, to two units in the last place.
__device__ __forceinline__ float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 2) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// The value that memory will hold: what is normalised must be what the backward pass reads.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return to_float(from_float<T>(x));
}

__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// How memory is read: `once` leaves the caches first, `constant` is never written while the kernel runs and stays in
// the first cache, `plain` says nothing. The norms are 1% to 4% faster with plain than with once (docs/LOG.md).
enum class Read { plain, once, constant };

// One access of 4, 8 or 16 bytes.
template <Read HOW, typename V>
__device__ __forceinline__ V read(const V* p) {
  if constexpr (HOW == Read::once) {
    return __ldcs(p);
  } else if constexpr (HOW == Read::constant) {
    return __ldg(p);
  } else {
    return *p;
  }
}

// N elements at p, aligned to 16 bytes or, if they are fewer, to their size.
template <typename T, int N, Read HOW = Read::once>
__device__ __forceinline__ void load(const T* p, float (&out)[N]) {
  if constexpr (sizeof(T) == 4 && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const float4 v = read<HOW>(reinterpret_cast<const float4*>(p) + i);
      out[4 * i] = v.x, out[4 * i + 1] = v.y, out[4 * i + 2] = v.z, out[4 * i + 3] = v.w;
    }
  } else if constexpr (sizeof(T) == 2 && N % 4 == 0) {
    unsigned word[N / 2];
    if constexpr (N % 8 == 0) {
#pragma unroll
      for (int i = 0; i < N / 8; ++i) {
        const uint4 v = read<HOW>(reinterpret_cast<const uint4*>(p) + i);
        word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
      }
    } else {
      const uint2 v = read<HOW>(reinterpret_cast<const uint2*>(p));
      word[0] = v.x, word[1] = v.y;
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      out[2 * i] = __uint_as_float(word[i] << 16);
      out[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(p[i]);
  }
}

// The counterpart. The cache-operator intrinsics keep the stores whole: nvcc 13.0 splits some plain ones.
template <typename T, int N>
__device__ __forceinline__ void store(T* p, const float (&in)[N]) {
  if constexpr (sizeof(T) == 4 && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const float4 v = {in[4 * i], in[4 * i + 1], in[4 * i + 2], in[4 * i + 3]};
      __stcg(reinterpret_cast<float4*>(p) + i, v);
    }
  } else if constexpr (sizeof(T) == 2 && N % 8 == 0) {
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      const float* e = in + 8 * i;
      const uint4 v = {pack_bf16(e[0], e[1]), pack_bf16(e[2], e[3]), pack_bf16(e[4], e[5]), pack_bf16(e[6], e[7])};
      __stcg(reinterpret_cast<uint4*>(p) + i, v);
    }
  } else if constexpr (sizeof(T) == 2 && N == 4) {
    const uint2 v = {pack_bf16(in[0], in[1]), pack_bf16(in[2], in[3])};
    __stcg(reinterpret_cast<uint2*>(p), v);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) p[i] = from_float<T>(in[i]);
  }
}

// The sum over groups of LANES neighbouring lanes, in every lane; a butterfly, so always the same order.
template <int LANES>
__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}

// A vector that every row needs, float32 or bfloat16: a branch that all threads take alike.
struct Weight {
  const void* data;
  bool is_bf16;

  template <int N>
  __device__ __forceinline__ void load(int64_t at, float (&out)[N]) const {
    if (is_bf16) {
      mtlm::load<bf16, N, Read::constant>(static_cast<const bf16*>(data) + at, out);
    } else {
      mtlm::load<float, N, Read::constant>(static_cast<const float*>(data) + at, out);
    }
  }
};

// Calls run(constant) with the one of VALUES that equals `value`, as a compile-time constant; false if none does.
template <auto... VALUES, typename Value, typename Run>
bool dispatch(Value value, Run run) {
  return ((value == VALUES && (run(std::integral_constant<decltype(VALUES), VALUES>()), true)) || ...);
}

inline int attribute(cudaDeviceAttr which) {  // of the current device; the runtime caches them
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

// Bytes of shared memory that a block may ask for.
inline int shared_memory() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Launches a kernel with so many bytes of dynamic shared memory. The most that it may ask for is one number per device,
// for all threads of the process: another's call must not come in between.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_with_shared(void (*kernel)(Parameters...), unsigned blocks, int threads, int bytes,
                               cudaStream_t stream, const Arguments&... arguments) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, threads, bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace mtlm
