// What the bindings share: checks of inputs and outputs, the device and stream to run on.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <string>

#include "kernels.h"

namespace mtlm::op {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline Type type_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float, name,
                  " must be bfloat16 or float32, not the scalar type ", static_cast<int>(type));
  return type == ScalarType::BFloat16 ? Type::bfloat16 : Type::float32;
}

// What every input must be: on the device of the first, of this shape.
inline void check(const Tensor& t, const char* name, const Tensor& like, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), name, " is on another device");
  bool equal = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) equal = equal && t.size(i++) == size;
  std::string wanted = "[";
  for (const int64_t size : sizes) wanted += (wanted.size() > 1 ? ", " : "") + std::to_string(size);
  STD_TORCH_CHECK(equal, name, " must be ", wanted, "], not ", shape(t));
}

inline void check_whole_rows(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.size(last) <= 1 || t.stride(last) == 1, "the elements of the last dimension of ", name,
                  " must be neighbours; their stride is ", t.stride(last));
}

// What is written, whole and in order.
inline void check_out(const Tensor& t, const char* name, const Tensor& like, std::initializer_list<int64_t> sizes) {
  check(t, name, like, sizes);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_out(const Tensor& t, const char* name, const Tensor& like, std::initializer_list<int64_t> sizes,
                      ScalarType type) {
  check_out(t, name, like, sizes);
  STD_TORCH_CHECK(t.scalar_type() == type, name, " has the scalar type ", static_cast<int>(t.scalar_type()),
                  ", not ", static_cast<int>(type));
}

inline Rows rows_of(const Tensor& t, const char* name) {
  check_whole_rows(t, name);
  return {t.const_data_ptr(), t.stride(0)};
}

// The device and the stream that PyTorch works on, for as long as this lives.
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Place(const Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

inline void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, "mtlm::", op, ": ", cudaGetErrorString(error));
}

constexpr int64_t MOST_BLOCKS = std::numeric_limits<int32_t>::max();  // of a CUDA grid

}  // namespace mtlm::op
