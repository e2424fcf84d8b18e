// The CUDA implementations of the ops of one decoding step. Everything is bfloat16 and lies whole, for a step makes
// no copies: what does not is refused.
#include "binding.h"

#include <cmath>
#include <optional>

namespace mtlm::op {
namespace {

constexpr int64_t MOST_ROWS = 64;             // of the batch: eight tiles of the tensor cores
constexpr int64_t MOST_TOKENS = 1 << 24;      // of the vocabulary
constexpr int64_t MOST_ELEMENTS = 1 << 28;    // rows or columns of a matrix

void check_dense(const Tensor& t, const char* name, ScalarType type, const Tensor& like,
                 std::initializer_list<int64_t> sizes) {
  check(t, name, like, sizes);
  STD_TORCH_CHECK(t.scalar_type() == type, name, " must be ",
                  type == ScalarType::BFloat16 ? "bfloat16" : type == ScalarType::Long ? "int64" : "float32",
                  ", not the scalar type ", static_cast<int>(t.scalar_type()));
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, name,
                  " must begin at a multiple of 16 bytes");
}

void check_dense(const Tensor& t, const char* name, const Tensor& like, std::initializer_list<int64_t> sizes) {
  check_dense(t, name, ScalarType::BFloat16, like, sizes);
}

int64_t* integers(const Tensor& t, const char* name, const Tensor& like, int64_t size) {
  check(t, name, like, {size});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous(), name, " must be int64 and contiguous");
  return static_cast<int64_t*>(t.mutable_data_ptr());
}

int64_t check_batch(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must be [batch, d], not ", shape(x));
  STD_TORCH_CHECK(x.size(0) >= 1 && x.size(0) <= MOST_ROWS, name, " has ", x.size(0), " rows; a step takes 1 to ",
                  MOST_ROWS);
  return x.size(0);
}

// What all products share: weight [rows, columns] of in [batch, columns].
DecodeProjection projection(const Tensor& in, const std::optional<Tensor>& norm, double eps, const Tensor& weight,
                            const std::optional<Tensor>& bias) {
  const int64_t batch = check_batch(in, "the input"), columns = in.size(1);
  STD_TORCH_CHECK(weight.dim() == 2, "weight must be [rows, columns], not ", shape(weight));
  const int64_t rows = weight.size(0);
  STD_TORCH_CHECK(columns % 8 == 0 && columns >= 8 && columns <= MOST_ELEMENTS && rows >= 1 && rows <= MOST_ELEMENTS,
                  "a weight of shape ", shape(weight), ": its columns must be a multiple of 8, both at most ",
                  MOST_ELEMENTS);
  check_dense(in, "the input", in, {batch, columns});
  check_dense(weight, "weight", in, {rows, columns});
  if (norm.has_value()) check_dense(*norm, "norm", in, {columns});
  if (bias.has_value()) check_dense(*bias, "bias", in, {rows});
  DecodeProjection args = {};
  args.in = in.const_data_ptr();
  args.norm = norm.has_value() ? norm->const_data_ptr() : nullptr;
  args.eps = static_cast<float>(eps);
  args.weight = weight.const_data_ptr();
  args.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  args.batch = static_cast<int>(batch), args.rows = static_cast<int>(rows), args.columns = static_cast<int>(columns);
  return args;
}

// Heads and their elements are neighbours; rows and positions lie as they like, at multiples of 16 bytes.
void check_cache(const Tensor& cache, const char* name, const Tensor& q, int64_t batch, int64_t d) {
  STD_TORCH_CHECK(cache.dim() == 4, name, " must be [batch, positions, heads, head size], not ", shape(cache));
  check(cache, name, q, {batch, cache.size(1), cache.size(2), cache.size(3)});
  const int64_t size = cache.size(3);
  STD_TORCH_CHECK(cache.size(2) * size == d, name, " has ", cache.size(2), " heads of ", size, "; d is ", d);
  STD_TORCH_CHECK(size % 16 == 0, "the head size must be a multiple of 16, not ", size);
  STD_TORCH_CHECK(cache.scalar_type() == ScalarType::BFloat16, name, " must be bfloat16");
  STD_TORCH_CHECK(cache.stride(3) == 1 && cache.stride(2) == size && cache.stride(0) % 8 == 0 &&
                      cache.stride(1) % 8 == 0 && reinterpret_cast<uintptr_t>(cache.const_data_ptr()) % 16 == 0,
                  name, " must have whole heads, at multiples of 16 bytes; the strides are ", cache.stride(0), ", ",
                  cache.stride(1), ", ", cache.stride(2), ", ", cache.stride(3));
}

void check_caches(const Tensor& k_cache, const Tensor& v_cache, const Tensor& q, int64_t batch, int64_t d) {
  check_cache(k_cache, "k_cache", q, batch, d);
  check_cache(v_cache, "v_cache", q, batch, d);
  check(v_cache, "v_cache", q, {batch, k_cache.size(1), k_cache.size(2), k_cache.size(3)});
  STD_TORCH_CHECK(k_cache.stride(0) == v_cache.stride(0) && k_cache.stride(1) == v_cache.stride(1),
                  "k_cache and v_cache must have the same strides");
}

void decode_embed_(Tensor token, Tensor position, Tensor table, std::optional<Tensor> learned, Tensor x) {
  const int64_t batch = check_batch(x, "x"), d = x.size(1);
  STD_TORCH_CHECK(table.dim() == 2, "table must be [vocabulary, d], not ", shape(table));
  check_dense(x, "x", x, {batch, d});
  check_dense(table, "table", x, {table.size(0), d});
  if (learned.has_value()) {
    STD_TORCH_CHECK(learned->dim() == 2, "learned must be [positions, d], not ", shape(*learned));
    check_dense(*learned, "learned", x, {learned->size(0), d});
  }
  const Place place(x);
  const DecodeEmbedding args = {integers(token, "token", x, batch),
                                integers(position, "position", x, batch),
                                table.const_data_ptr(),
                                learned.has_value() ? learned->const_data_ptr() : nullptr,
                                x.mutable_data_ptr(),
                                static_cast<int>(batch),
                                static_cast<int>(d)};
  check_launch(decode_embed(args, place.stream), "decode_embed_");
}

void decode_qkv_(Tensor x, Tensor norm, double eps, Tensor weight, std::optional<Tensor> bias,
                 std::optional<Tensor> cos, std::optional<Tensor> sin, Tensor position, Tensor q, Tensor k_cache,
                 Tensor v_cache) {
  DecodeProjection args = projection(x, norm, eps, weight, bias);
  const int64_t batch = x.size(0), d = x.size(1);
  check(weight, "weight", x, {3 * d, d});
  check_dense(q, "q", x, {batch, d});
  check_caches(k_cache, v_cache, x, batch, d);
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos and sin go together");
  args.head_size = static_cast<int>(k_cache.size(3));
  if (cos.has_value()) {
    STD_TORCH_CHECK(cos->dim() == 2 && cos->size(0) >= k_cache.size(1), "cos must be [", k_cache.size(1),
                    " or more, ", args.head_size / 2, "], not ", shape(*cos));
    for (const Tensor* t : {&*cos, &*sin}) {
      check_dense(*t, "cos or sin", ScalarType::Float, x, {cos->size(0), args.head_size / 2});
    }
    args.cos = static_cast<const float*>(cos->const_data_ptr());
    args.sin = static_cast<const float*>(sin->const_data_ptr());
  }
  args.position = integers(position, "position", x, batch);
  args.out = q.mutable_data_ptr();
  args.k_cache = k_cache.mutable_data_ptr(), args.v_cache = v_cache.mutable_data_ptr();
  args.cache_batch = k_cache.stride(0), args.cache_position = k_cache.stride(1);
  const Place place(x);
  check_launch(decode_project(args, DecodeInto::qkv, place.stream), "decode_qkv_");
}

void decode_attention_(Tensor q, Tensor k_cache, Tensor v_cache, Tensor position, Tensor out) {
  const int64_t batch = check_batch(q, "q"), d = q.size(1);
  check_dense(q, "q", q, {batch, d});
  check_dense(out, "out", q, {batch, d});
  check_caches(k_cache, v_cache, q, batch, d);
  const int64_t size = k_cache.size(3);
  STD_TORCH_CHECK(size == 32 || size == 64 || size == 128, "the head size must be 32, 64 or 128, not ", size);
  const DecodeAttention args = {q.const_data_ptr(),
                                k_cache.const_data_ptr(),
                                v_cache.const_data_ptr(),
                                integers(position, "position", q, batch),
                                out.mutable_data_ptr(),
                                static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(size))),
                                static_cast<int>(batch),
                                static_cast<int>(k_cache.size(2)),
                                k_cache.stride(0),
                                k_cache.stride(1)};
  const Place place(q);
  check_launch(decode_attention(args, static_cast<int>(size), place.stream), "decode_attention_");
}

void decode_add_projection_(Tensor a, Tensor weight, std::optional<Tensor> bias, Tensor x) {
  DecodeProjection args = projection(a, std::nullopt, 0, weight, bias);
  check_dense(x, "x", a, {a.size(0), weight.size(0)});
  args.out = x.mutable_data_ptr();
  const Place place(a);
  check_launch(decode_project(args, DecodeInto::residual, place.stream), "decode_add_projection_");
}

void decode_mlp_(Tensor x, Tensor norm, double eps, Tensor weight, std::optional<Tensor> bias, bool gated,
                 Tensor hidden) {
  DecodeProjection args = projection(x, norm, eps, weight, bias);
  const int64_t rows = weight.size(0);
  STD_TORCH_CHECK(!gated || rows % 16 == 0, "gate and up must have a multiple of 8 rows each, not ", rows, " together");
  check_dense(hidden, "hidden", x, {x.size(0), gated ? rows / 2 : rows});
  args.out = hidden.mutable_data_ptr();
  const Place place(x);
  check_launch(decode_project(args, gated ? DecodeInto::gated : DecodeInto::gelu, place.stream), "decode_mlp_");
}

void decode_logits_(Tensor x, Tensor norm, double eps, Tensor table, Tensor logits) {
  DecodeProjection args = projection(x, norm, eps, table, std::nullopt);
  check_dense(logits, "logits", ScalarType::Float, x, {x.size(0), table.size(0)});
  args.out = logits.mutable_data_ptr();
  const Place place(x);
  check_launch(decode_project(args, DecodeInto::logits, place.stream), "decode_logits_");
}

void decode_sample_(Tensor logits, Tensor real, Tensor whole, int64_t last, Tensor position, Tensor token) {
  const int64_t batch = check_batch(logits, "logits"), vocab = logits.size(1);
  STD_TORCH_CHECK(vocab >= 1 && vocab <= MOST_TOKENS, "logits has ", vocab, " columns; at least 1, at most ",
                  MOST_TOKENS);
  check_dense(logits, "logits", ScalarType::Float, logits, {batch, vocab});
  check_dense(real, "real", ScalarType::Float, logits, {2});
  const DecodeSample args = {static_cast<const float*>(logits.const_data_ptr()),
                             static_cast<const float*>(real.const_data_ptr()),
                             integers(whole, "whole", logits, 3),
                             integers(position, "position", logits, batch),
                             integers(token, "token", logits, batch),
                             last,
                             static_cast<int>(batch),
                             static_cast<int>(vocab)};
  const Place place(logits);
  check_launch(decode_sample(args, place.stream), "decode_sample_");
}

}  // namespace
}  // namespace mtlm::op

STABLE_TORCH_LIBRARY_IMPL(mtlm, CUDA, m) {
  m.impl("decode_embed_", TORCH_BOX(&mtlm::op::decode_embed_));
  m.impl("decode_qkv_", TORCH_BOX(&mtlm::op::decode_qkv_));
  m.impl("decode_attention_", TORCH_BOX(&mtlm::op::decode_attention_));
  m.impl("decode_add_projection_", TORCH_BOX(&mtlm::op::decode_add_projection_));
  m.impl("decode_mlp_", TORCH_BOX(&mtlm::op::decode_mlp_));
  m.impl("decode_logits_", TORCH_BOX(&mtlm::op::decode_logits_));
  m.impl("decode_sample_", TORCH_BOX(&mtlm::op::decode_sample_));
}
