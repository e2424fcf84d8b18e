// What the .cu files offer: raw pointers, strides in elements, a stream; no torch. Callers check the shapes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace mtlm {

enum class Type { float32, bfloat16 };

// A matrix whose rows are contiguous inside; `stride` elements from row to row.
struct Rows {
  const void* data;
  int64_t stride;
};

// rms_norm.cu. `branch` and `sum` are null for the norm alone, of `residual`.
struct RMSNormForward {
  Rows branch;          // [rows, d] of `type`
  Rows residual;        // [rows, d] of `residual_type`
  const void* weight;   // [d] of `weight_type`
  float eps;
  void* normed;         // [rows, d] of `type`, contiguous
  void* sum;            // [rows, d] of `residual_type`, contiguous
  float* rstd;          // [rows]
};

struct RMSNormBackward {
  Rows d_normed;        // [rows, d] of `type`
  Rows d_sum;           // [rows, d] of `residual_type`, or null
  Rows x;               // [rows, d] of `residual_type`: what was normalised
  const float* rstd;    // [rows]
  const void* weight;   // [d] of `weight_type`
  void* d_x;            // [rows, d] of `residual_type`, contiguous
  void* d_branch;       // the same in `type`, or null
  float* partials;      // [rms_norm_partials(rows), d]
  void* d_weight;       // [d] of `weight_type`
};

cudaError_t rms_norm_forward(const RMSNormForward& a, int64_t rows, int64_t d, Type type, Type residual_type,
                             Type weight_type, cudaStream_t stream);
int64_t rms_norm_partials(int64_t rows);
cudaError_t rms_norm_backward(const RMSNormBackward& a, int64_t rows, int64_t d, Type type, Type residual_type,
                              Type weight_type, cudaStream_t stream);

// rotary.cu. One of q, k, v: [batch, seq, heads, head size], the last contiguous. In place where src is dst.
struct HeadsView {
  const void* src;
  int64_t src_batch, src_seq, src_head;
  void* dst;
  int64_t dst_batch, dst_seq, dst_head;
};

struct Rotary {
  HeadsView views[3];   // q, k and, to be copied, v
  int count;            // how many of them: 2 or 3
  const float* cos;     // [1 or batch, seq, head size / 2]
  const float* sin;
  int64_t angle_batch;  // elements from batch to batch of cos and sin, 0 for one of all
  int64_t batch, seq;
  int heads, half;
  bool conjugate;
};

cudaError_t rotary(const Rotary& a, Type type, cudaStream_t stream);

// softmax_loss.cu
struct SoftmaxLoss {
  void* logits;           // [rows, vocab], replaced by their gradient if `gradients`
  int64_t stride;
  const int64_t* targets; // [rows]
  float* total;           // [rows]
  float* nll;             // [rows]
  float z_loss;
  bool gradients;
};

cudaError_t softmax_loss(const SoftmaxLoss& a, int64_t rows, int64_t vocab, Type type, cudaStream_t stream);

// adamw.cu
struct AdamWTensor {
  float* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  void* copy;  // bfloat16, or null
  int64_t size;
  Type grad_type;
};

struct AdamWSettings {
  const float* lr;          // device scalars
  const float* step;        // the number of this update, from 1
  const float* grad_scale;  // multiplies every gradient
  const bool* skip;         // nothing is changed
  float beta2, rest1, rest2;  // 1 - beta of each, rounded once: 1.0f - 0.9999f is off by 1.7e-4 of itself
  float log_beta1, log_beta2, eps, weight_decay;
};

cudaError_t adamw(const AdamWTensor* tensors, int64_t count, const AdamWSettings& settings, cudaStream_t stream);

// decode_project.cu: a product with a weight matrix for one new token a row, and what is done with it.
enum class DecodeInto { qkv, residual, gated, gelu, logits };

// Everything bfloat16 and contiguous but for what says otherwise; columns a multiple of 8.
struct DecodeProjection {
  const void* in;        // [batch, columns]
  const void* norm;      // [columns]; unused for `residual`
  float eps;
  const void* weight;    // [rows, columns]: q, k, v; or gate, up for `gated`
  const void* bias;      // [rows] or null; null for `logits`
  void* out;             // q [batch, rows / 3]; x; hidden [batch, rows, or half of it]; float32 logits
  int batch, rows, columns;
  // Of `qkv` alone; the head size a multiple of 16.
  int head_size;
  const int64_t* position;  // [batch]
  const float* cos;         // [positions, head size / 2] or null
  const float* sin;
  void* k_cache;            // [batch, positions, heads, head size], heads and their elements contiguous
  void* v_cache;
  int64_t cache_batch, cache_position;  // elements from row to row, from position to position
};

cudaError_t decode_project(const DecodeProjection& a, DecodeInto into, cudaStream_t stream);

// decode_attention.cu; head sizes of 32, 64 and 128.
struct DecodeAttention {
  const void* q;            // [batch, heads, head size]
  const void* k_cache;      // as above
  const void* v_cache;
  const int64_t* position;  // [batch]: the last one that is seen
  void* out;                // [batch, heads, head size]
  float scale;              // log2(e) / sqrt(head size)
  int batch, heads;
  int64_t cache_batch, cache_position;
};

cudaError_t decode_attention(const DecodeAttention& a, int head_size, cudaStream_t stream);

// decode_sample.cu
struct DecodeEmbedding {
  const int64_t* token;     // [batch]
  const int64_t* position;  // [batch]
  const void* table;        // [vocabulary, d] bfloat16
  const void* learned;      // [positions, d] bfloat16 or null
  void* x;                  // [batch, d] bfloat16
  int batch, d;
};

cudaError_t decode_embed(const DecodeEmbedding& a, cudaStream_t stream);

struct DecodeSample {
  const float* logits;     // [batch, vocab]
  const float* real;       // temperature, top_p
  const int64_t* whole;    // top_k, seed, number of the first row
  int64_t* position;       // [batch], moved on by one, at most to `last`
  int64_t* token;          // [batch]: the draws
  int64_t last;
  int batch, vocab;
};

cudaError_t decode_sample(const DecodeSample& a, cudaStream_t stream);

}  // namespace mtlm
