// What the launcher of an op is given, and how it checks that. No framework here nor in the .cu files: binding_torch.cpp
// and binding_xla.cpp make the views. Nothing is allocated: PyTorch's stable ABI loses the type of an error, and training
// must be able to tell that memory ran out; XLA plans all memory of a program beforehand.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace mtlm {

enum class Type { float32, bfloat16, int64, boolean, int32, other };

inline const char* name_of(Type type) {
  constexpr const char* NAMES[] = {"float32", "bfloat16", "int64", "bool", "int32", "another type"};
  return NAMES[static_cast<int>(type)];
}

// A tensor that an op reads; strides in elements. Sizes and strides are the caller's.
struct View {
  const void* data;
  Type type;
  int device;  // number of the GPU; -1 for anything else
  int dims;
  const int64_t* sizes;
  const int64_t* strides;
  int64_t count;  // of elements
  bool contiguous;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// A tensor that an op writes.
struct Out : View {
  template <typename T = void>
  T* out() const {
    return static_cast<T*>(const_cast<void*>(data));
  }
};

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// A mistake of the caller, in words made of the parts.
#define REQUIRE(condition, ...) \
  do {                          \
    if (!(condition)) ::mtlm::refuse(__VA_ARGS__); \
  } while (false)

constexpr int64_t MOST_BLOCKS = std::numeric_limits<int32_t>::max();  // of a CUDA grid

inline std::string shape(const int64_t* sizes, int64_t dims) {
  std::string text = "[";
  for (int64_t i = 0; i < dims; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::string shape(const View& t) { return shape(t.sizes, t.dims); }

inline Type float_type(const View& t, const char* name) {
  REQUIRE(t.type == Type::bfloat16 || t.type == Type::float32, name, " must be bfloat16 or float32, not ",
          name_of(t.type));
  return t.type;
}

// What every argument must be: on the device of another one, of this shape.
inline void check(const View& t, const char* name, const View& like, std::initializer_list<int64_t> sizes) {
  REQUIRE(t.device >= 0 && t.device == like.device, name, " is on another device");
  bool equal = t.dims == static_cast<int>(sizes.size());
  for (int i = 0; equal && i < t.dims; ++i) equal = t.sizes[i] == sizes.begin()[i];
  REQUIRE(equal, name, " must be ", shape(sizes.begin(), static_cast<int64_t>(sizes.size())), ", not ", shape(t));
}

// What is also of one type and contiguous.
inline void check(const View& t, const char* name, const View& like, std::initializer_list<int64_t> sizes, Type type) {
  check(t, name, like, sizes);
  REQUIRE(t.type == type, name, " must be ", name_of(type), ", not ", name_of(t.type));
  REQUIRE(t.contiguous, name, " must be contiguous");
}

inline void check_matrix(const View& x, const char* name) {
  REQUIRE(x.dims == 2, name, " must be [rows, d], not ", shape(x));
  REQUIRE(x.sizes[0] <= MOST_BLOCKS, name, " has ", x.sizes[0], " rows; at most ", MOST_BLOCKS);
}

inline void check_rows_contiguous(const View& t, const char* name) {
  const int last = t.dims - 1;
  REQUIRE(t.sizes[last] <= 1 || t.strides[last] == 1, "the elements of the last dimension of ", name,
          " must be neighbours; their stride is ", t.strides[last]);
}

}  // namespace mtlm
