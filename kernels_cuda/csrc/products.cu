// Matrix products by cuBLASLt, with what follows or precedes them in the epilogue: bias and GELU (tanh form), or GELU's
// gradient and the bias's.
//
//   gelu_product           pre = x weight^T + bias     out = gelu(pre)
//   gelu_product_backward  d_pre = (d weight) * gelu'(pre)     d_bias = column sums of d_pre
//   product                out = a b + c
//
// On their own GELU reads and writes each of N x F elements once, its gradient reads two and writes one; here the
// forward pass only writes `pre` next to `out`, the backward pass only reads it. Products are summed in float32, also
// where the inner dimension is split (REDUCE_IN_FLOAT32): the parts go through the workspace and are added in a fixed
// order, without atomics.
//
// The library is the one that PyTorch has loaded, found by its versioned name: nothing is linked, no header is needed,
// and a file built for CUDA 13 also loads next to a PyTorch of CUDA 12. Its matrices are by columns, so every product
// of ours, by rows, is given to it transposed: out^T = b^T a^T.
#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "op.h"

namespace mtlm {
namespace {

// The part of cuBLASLt's interface that is used, the same in versions 12 and 13.
using Handle = void*;
using Object = void*;  // a description of a product or of a matrix, or preferences
using Status = int;

struct Algorithm {
  uint64_t opaque[8];
};

struct Proposal {
  Algorithm algorithm;
  size_t workspace;
  Status status;
  float waves;
  int reserved[4];
};

constexpr int COMPUTE_FLOAT32 = 68;
constexpr uint32_t REDUCE_IN_FLOAT32 = 2;

enum ProductAttribute { TRANSPOSE_A = 3, TRANSPOSE_B = 4, EPILOGUE = 7, BIAS = 8, AUX = 11, AUX_STRIDE = 12 };
enum Preference { WORKSPACE_BYTES = 1, REDUCTIONS = 3, ALIGNMENT_A = 5, ALIGNMENT_B, ALIGNMENT_C, ALIGNMENT_D };
enum class Epilogue : uint32_t { none = 1, gelu_aux_bias = 32 | 128 | 4, dgelu_bgrad = 64 | 128 | 16, bgradb = 512 };

struct Library {
  Status (*create)(Handle*);
  const char* (*status_string)(Status);
  Status (*product_create)(Object*, int compute, int scale);
  Status (*product_set)(Object, int attribute, const void*, size_t);
  Status (*product_destroy)(Object);
  Status (*matrix_create)(Object*, int type, uint64_t rows, uint64_t columns, int64_t stride);
  Status (*matrix_destroy)(Object);
  Status (*preference_create)(Object*);
  Status (*preference_set)(Object, int attribute, const void*, size_t);
  Status (*preference_destroy)(Object);
  Status (*propose)(Handle, Object, Object, Object, Object, Object, Object, int, Proposal*, int*);
  Status (*multiply)(Handle, Object, const void*, const void*, Object, const void*, Object, const void*, const void*,
                     Object, void*, Object, const Algorithm*, void*, size_t, cudaStream_t);
};

template <typename Function>
void find(void* file, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(file, name));
  REQUIRE(function != nullptr, "libcublasLt has no ", name);
}

Library open_library() {
  void* file = nullptr;
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    if (file == nullptr) file = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
  }
  REQUIRE(file != nullptr, "neither libcublasLt.so.13 nor libcublasLt.so.12 is loaded in this process");
  Library lt;
  find(file, "cublasLtCreate", lt.create);
  find(file, "cublasLtGetStatusString", lt.status_string);
  find(file, "cublasLtMatmulDescCreate", lt.product_create);
  find(file, "cublasLtMatmulDescSetAttribute", lt.product_set);
  find(file, "cublasLtMatmulDescDestroy", lt.product_destroy);
  find(file, "cublasLtMatrixLayoutCreate", lt.matrix_create);
  find(file, "cublasLtMatrixLayoutDestroy", lt.matrix_destroy);
  find(file, "cublasLtMatmulPreferenceCreate", lt.preference_create);
  find(file, "cublasLtMatmulPreferenceSetAttribute", lt.preference_set);
  find(file, "cublasLtMatmulPreferenceDestroy", lt.preference_destroy);
  find(file, "cublasLtMatmulAlgoGetHeuristic", lt.propose);
  find(file, "cublasLtMatmul", lt.multiply);
  return lt;
}

const Library& library() {
  static const Library opened = open_library();
  return opened;
}

void succeed(Status status, const char* what) {
  REQUIRE(status == 0, what, ": ", library().status_string(status));
}

// An object of the library's that is destroyed with this.
class Owned {
 public:
  explicit Owned(Status (*destroy)(Object)) : destroy_(destroy) {}
  ~Owned() {
    if (object != nullptr) destroy_(object);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  Object object = nullptr;

 private:
  Status (*destroy_)(Object);
};

// A bfloat16 matrix by columns: `rows` elements follow each other, `stride` from column to column.
struct Columns {
  const void* data;
  int64_t rows, columns, stride;
  bool transposed;  // whether the product takes its transpose
};

struct Product {
  Columns a, b, d;  // d = a b, written
  const void* c;    // added; laid out like d, or null
  Epilogue epilogue;
  const void* bias;  // written by `bgrad`s, else read; null for none
  const void* aux;   // written by `gelu`, read by `dgelu`; laid out like d, or null
  View workspace;    // float32
  int64_t choice;    // which of the library's proposals, the likely best first; the last if there are fewer
};

int64_t alignment(const void* data) {
  int64_t bytes = 256;
  while (reinterpret_cast<uintptr_t>(data) % bytes != 0) bytes /= 2;
  return bytes;
}

int64_t bytes_of(const View& workspace) { return workspace.count * 4; }

template <typename Value>
void set(Status (*function)(Object, int, const void*, size_t), const Owned& owned, int attribute, const Value& value) {
  succeed(function(owned.object, attribute, &value, sizeof(value)), "cuBLASLt refuses an attribute");
}

void make_matrix(Owned& owned, const Columns& m) {
  succeed(library().matrix_create(&owned.object, CUDA_R_16BF, m.rows, m.columns, m.stride), "cuBLASLt matrix");
}

Handle handle_of(int device) {
  static std::mutex mutex;
  static std::map<int, Handle> handles;  // kept until the process ends, as CUDA's context is
  const std::lock_guard<std::mutex> lock(mutex);
  Handle& handle = handles[device];
  if (handle == nullptr) succeed(library().create(&handle), "cublasLtCreate");
  return handle;
}

// What the library would choose among for these sizes, strides and alignments, asked for once.
using Proposals = std::vector<Proposal>;

Proposals ask(Handle handle, const Product& p, Object product, Object a, Object b, Object d) {
  constexpr int MOST = 16;
  const Library& lt = library();
  Owned preference(lt.preference_destroy);
  succeed(lt.preference_create(&preference.object), "cuBLASLt preference");
  set(lt.preference_set, preference, WORKSPACE_BYTES, static_cast<uint64_t>(bytes_of(p.workspace)));
  set(lt.preference_set, preference, REDUCTIONS, REDUCE_IN_FLOAT32);
  const void* const matrices[] = {p.a.data, p.b.data, p.c == nullptr ? p.d.data : p.c, p.d.data};
  for (int i = 0; i < 4; ++i) {
    set(lt.preference_set, preference, ALIGNMENT_A + i, static_cast<uint32_t>(alignment(matrices[i])));
  }
  Proposals all(MOST);
  int count = 0;
  const Status status = lt.propose(handle, product, a, b, d, d, preference.object, MOST, all.data(), &count);
  REQUIRE(status == 0 && count > 0, "cuBLASLt has no algorithm for epilogue ", static_cast<uint32_t>(p.epilogue),
          " of [", p.d.columns, ", ", p.d.rows, "], inner dimension ", p.a.transposed ? p.a.rows : p.a.columns, ": ",
          lt.status_string(status));
  all.resize(count);
  return all;
}

const Proposals& proposals(Handle handle, const Product& p, Object product, Object a, Object b, Object d) {
  static std::mutex mutex;
  static std::map<std::vector<int64_t>, Proposals> known;
  std::vector<int64_t> key = {p.workspace.device, bytes_of(p.workspace), static_cast<int64_t>(p.epilogue)};
  for (const Columns& m : {p.a, p.b, p.d}) {
    key.insert(key.end(), {m.rows, m.columns, m.stride, m.transposed, alignment(m.data)});
  }
  for (const void* other : {p.c, p.bias, p.aux}) key.push_back(other == nullptr ? 0 : alignment(other));
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known.emplace(std::move(key), ask(handle, p, product, a, b, d)).first->second;
}

cudaError_t multiply(cudaStream_t stream, const Product& p) {
  const Library& lt = library();
  const Handle handle = handle_of(p.workspace.device);
  Owned product(lt.product_destroy), a(lt.matrix_destroy), b(lt.matrix_destroy), d(lt.matrix_destroy);
  succeed(lt.product_create(&product.object, COMPUTE_FLOAT32, CUDA_R_32F), "cuBLASLt product");
  set(lt.product_set, product, TRANSPOSE_A, static_cast<int32_t>(p.a.transposed));
  set(lt.product_set, product, TRANSPOSE_B, static_cast<int32_t>(p.b.transposed));
  set(lt.product_set, product, EPILOGUE, static_cast<uint32_t>(p.epilogue));
  if (p.bias != nullptr) set(lt.product_set, product, BIAS, p.bias);
  if (p.aux != nullptr) {
    set(lt.product_set, product, AUX, p.aux);
    set(lt.product_set, product, AUX_STRIDE, p.d.stride);
  }
  make_matrix(a, p.a), make_matrix(b, p.b), make_matrix(d, p.d);
  const Proposals& all = proposals(handle, p, product.object, a.object, b.object, d.object);
  const Proposal& taken = all[std::min<size_t>(p.choice, all.size() - 1)];
  const float one = 1, beta = p.c == nullptr ? 0 : 1;
  void* out = const_cast<void*>(p.d.data);
  succeed(lt.multiply(handle, product.object, &one, p.a.data, a.object, p.b.data, b.object, &beta,
                      p.c == nullptr ? out : p.c, d.object, out, d.object, &taken.algorithm,
                      const_cast<void*>(p.workspace.data), bytes_of(p.workspace), stream),
          "cublasLtMatmul");
  return cudaSuccess;
}

// [rows, columns] by rows, which is [columns, rows] by columns.
Columns whole(const View& t, bool transposed) {
  return {t.data, t.sizes[1], t.sizes[0], std::max<int64_t>(t.sizes[1], 1), transposed};
}

// The same of a matrix that lies by rows or by columns.
Columns either(const View& t, const char* name) {
  REQUIRE(t.dims == 2 && t.type == Type::bfloat16, name, " must be a matrix of bfloat16");
  if (t.strides[1] == 1 || t.sizes[1] == 1) {
    return {t.data, t.sizes[1], t.sizes[0], std::max(t.strides[0], t.sizes[1]), false};
  }
  REQUIRE(t.strides[0] == 1 || t.sizes[0] == 1, "the elements of ", name, " must be neighbours in a row or a column");
  return {t.data, t.sizes[0], t.sizes[1], std::max(t.strides[1], t.sizes[0]), true};
}

void check_workspace(const View& workspace, const View& like, int64_t choice) {
  check(workspace, "workspace", like, {workspace.count}, Type::float32);
  REQUIRE(choice >= 0, "choice must not be negative, but is ", choice);
}

// GELU's epilogues want rows of 16 bytes.
void check_widths(int64_t inner, int64_t width) {
  REQUIRE(inner % 8 == 0 && width % 8 == 0 && inner > 0 && width > 0, "widths must be multiples of 8, not ", inner,
          " and ", width);
}

}  // namespace

cudaError_t gelu_product_into(cudaStream_t stream, View x, View weight, View bias, Out out, Out pre, Out workspace,
                              int64_t choice) {
  check_matrix(x, "x");
  check_matrix(weight, "weight");
  const int64_t rows = x.sizes[0], inner = x.sizes[1], width = weight.sizes[0];
  check_widths(inner, width);
  check(x, "x", x, {rows, inner}, Type::bfloat16);
  check(weight, "weight", x, {width, inner}, Type::bfloat16);
  check(bias, "bias", x, {width}, Type::bfloat16);
  check(out, "out", x, {rows, width}, Type::bfloat16);
  check(pre, "pre", x, {rows, width}, Type::bfloat16);
  check_workspace(workspace, x, choice);
  if (rows == 0) return cudaSuccess;
  return multiply(stream, {whole(weight, true), whole(x, false), whole(out, false), nullptr, Epilogue::gelu_aux_bias,
                           bias.data, pre.data, workspace, choice});
}

cudaError_t gelu_product_backward_into(cudaStream_t stream, View d, View weight, View pre, Out d_pre, Out d_bias,
                                       Out workspace, int64_t choice) {
  check_matrix(d, "d");
  check_matrix(weight, "weight");
  const int64_t rows = d.sizes[0], inner = d.sizes[1], width = weight.sizes[1];
  check_widths(inner, width);
  check(d, "d", d, {rows, inner}, Type::bfloat16);
  check(weight, "weight", d, {inner, width}, Type::bfloat16);
  check(pre, "pre", d, {rows, width}, Type::bfloat16);
  check(d_pre, "d_pre", d, {rows, width}, Type::bfloat16);
  check(d_bias, "d_bias", d, {width}, Type::bfloat16);
  check_workspace(workspace, d, choice);
  if (rows == 0) return cudaMemsetAsync(d_bias.out(), 0, width * 2, stream);
  return multiply(stream, {whole(weight, false), whole(d, false), whole(d_pre, false), nullptr,
                           Epilogue::dgelu_bgrad, d_bias.data, pre.data, workspace, choice});
}

// `row_sums` [rows of a]: of a, which are a bias's gradient where a is the transpose of a layer's.
cudaError_t product_into(cudaStream_t stream, View a, View b, std::optional<View> c, Out out,
                         std::optional<Out> row_sums, Out workspace, int64_t choice) {
  check_matrix(a, "a");
  check_matrix(b, "b");
  const int64_t rows = a.sizes[0], inner = a.sizes[1], columns = b.sizes[1];
  check(b, "b", a, {inner, columns});
  check(out, "out", a, {rows, columns}, Type::bfloat16);
  if (c) check(*c, "c", a, {rows, columns}, Type::bfloat16);
  if (row_sums) check(*row_sums, "row_sums", a, {rows}, Type::bfloat16);
  REQUIRE(rows * inner * columns > 0, "a and b must not be empty");
  check_workspace(workspace, a, choice);
  return multiply(stream, {either(b, "b"), either(a, "a"), whole(out, false), c ? c->data : nullptr,
                           row_sums ? Epilogue::bgradb : Epilogue::none, row_sums ? row_sums->data : nullptr,
                           nullptr, workspace, choice});
}

}  // namespace mtlm
