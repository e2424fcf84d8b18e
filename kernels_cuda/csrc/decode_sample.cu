// The two ends of a decoding step: the embedding of the newest token, and the choice of the next one.
//
// A choice is an exponential race. With p_i = exp((s_i - max s) / T) of the tokens that are kept and E_i =
// -log(1 - u_i) of independent uniform u_i, argmax_i p_i / E_i is drawn from p / sum p: Gumbel-max, without
// logarithms of p. u_i is a word of Philox-4x32-10 (Salmon et al. 2011) of key (seed, number of the row) and counter
// (i / 4, position), so a draw depends on nothing else. Temperature 0 takes the likeliest token, the first of
// several.
//
// top-k and top-p keep the tokens with p_i >= t, those of equal p all or none; nothing is sorted. Most rows are cut
// among a few candidates. Every thread has the largest p of its tokens, and a bound that k of these reach is reached
// by k tokens at least, and by few more: tokens lie in threads as they come. Those that reach it are put together,
// one a thread, and each sums up the candidates above it: it is kept if they are fewer than k and have less than
// top_p of the mass (of those that top-k kept). Without top-k the bound is for half as many as there is room for;
// if the candidates have top_p of the mass, whoever is below them is out.
//
// Where they do not, or are too many (k is large, or many are equal), t is found by bisection over all tokens. The
// bits of a positive float are ordered as it is: the largest t that k tokens reach, or that tokens of top_p of the
// mass reach. It ends when one token is left between the bounds, after 15 to 20 counts as a rule. Counts are
// integers and sums of floats are taken in one order, each monotone in t.
//
// A row is a block of 512 threads, which hold its p in registers up to 32768 tokens; larger rows are read again
// for every count. Logits, 128 KB of float32 per row, go from the kernel before through the second-level cache.
#include "decode.cuh"

namespace mtlm {
namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int GROUPS = 16;  // of 4 neighbouring tokens that a thread holds
constexpr int SLACK = 16;   // threads that may reach a bound beyond those that have to
constexpr int64_t MOST_TOKENS = 1 << 24;  // of the vocabulary

struct DecodeEmbedding {
  const int64_t* token;     // [batch]
  const int64_t* position;  // [batch]
  const void* table;        // [vocabulary, d] bfloat16
  const void* learned;      // [positions, d] bfloat16 or null
  void* x;                  // [batch, d] bfloat16
  int d;
};

struct DecodeSample {
  const float* logits;   // [batch, vocab]
  const float* real;     // temperature, top_p
  const int64_t* whole;  // top_k, seed, number of the first row
  int64_t* position;     // [batch], moved on by one, at most to `last`
  int64_t* token;        // [batch]: the draws
  int64_t last;
  int vocab;
};

__global__ void embed(const __grid_constant__ DecodeEmbedding a) {
  wait_for_previous();
  launch_next();
  const int n = blockIdx.x;
  const int64_t token = read_fresh(a.token + n), position = read_fresh(a.position + n);
  const bf16* from = static_cast<const bf16*>(a.table) + token * a.d;
  const bf16* learned = static_cast<const bf16*>(a.learned);
  bf16* x = static_cast<bf16*>(a.x) + static_cast<int64_t>(n) * a.d;
  for (int i = threadIdx.x; i < a.d; i += blockDim.x) {
    const float of_position = learned == nullptr ? 0.f : to_float(learned[position * a.d + i]);
    x[i] = from_float<bf16>(to_float(from[i]) + of_position);
  }
}

__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned a = __umulhi(0xD2511F53u, counter.x), b = 0xD2511F53u * counter.x;
    const unsigned c = __umulhi(0xCD9E8D57u, counter.z), d = 0xCD9E8D57u * counter.z;
    counter = {c ^ counter.y ^ key.x, d, a ^ counter.w ^ key.y, b};
    key = {key.x + 0x9E3779B9u, key.y + 0xBB67AE85u};
  }
  return counter;
}

// Unsigned integers ordered as the floats are; both zeros are one.
__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = __float_as_uint(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(unsigned bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// A value's order above its index: the greatest is the largest value, of equal ones that of the smallest index.
__device__ __forceinline__ uint64_t ranked(unsigned order, int index) {
  return static_cast<uint64_t>(order) << 32 | static_cast<unsigned>(~index);
}

__device__ __forceinline__ uint64_t greatest_over_lanes(uint64_t x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint64_t other = __shfl_xor_sync(ALL_LANES, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// Over the block, in every thread.
__device__ __forceinline__ uint64_t greatest(uint64_t x, uint64_t (&shared)[WARPS]) {
  x = greatest_over_lanes(x);
  __syncthreads();  // what was there has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return greatest_over_lanes(shared[threadIdx.x % WARPS]);
}

struct Tally {
  int count;
  float mass;
};

// The race's time of a token, as a rank: the first one has the greatest.
__device__ __forceinline__ uint64_t rank_in_race(float p, unsigned word, int token) {
  const float u = fmaf(static_cast<float>(word), 0x1p-32f, 0x1p-33f);
  return ranked(__float_as_uint(p / -log1pf(-u)), token);
}

template <bool HELD>
__global__ __launch_bounds__(THREADS) void sample(const __grid_constant__ DecodeSample a) {
  __shared__ uint64_t shared[WARPS];
  __shared__ Tally tallies[2][WARPS];
  __shared__ float candidate_p[THREADS];
  __shared__ int candidate_token[THREADS];
  wait_for_previous();
  const int row = blockIdx.x;
  const float* logits = a.logits + static_cast<int64_t>(row) * a.vocab;
  const int64_t after = read_fresh(a.position + row) + 1, position = after < a.last ? after : a.last;
  const float temperature = a.real[0], top_p = a.real[1];
  const int64_t top_k = a.whole[0];
  const int groups = HELD ? GROUPS : (a.vocab + 4 * THREADS - 1) / (4 * THREADS);
  const bool whole = a.vocab % 4 == 0;
  const auto first_of = [](int group) { return 4 * (group * THREADS + static_cast<int>(threadIdx.x)); };
  const auto read_logits = [&](int group, float (&out)[4]) {
    const int first = first_of(group);
    if (whole && first < a.vocab) {
      const float4 v = __ldcg(reinterpret_cast<const float4*>(logits + first));
      out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] = first + i < a.vocab ? __ldcg(logits + first + i) : -INFINITY;
    }
  };

  float held[HELD ? GROUPS : 1][4];
  uint64_t best = 0;
#pragma unroll
  for (int group = 0; group < groups; ++group) {
    float (&s)[4] = held[HELD ? group : 0];
    read_logits(group, s);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint64_t rank = ranked(ordered(s[i]), first_of(group) + i);
      if (first_of(group) + i < a.vocab && rank > best) best = rank;
    }
  }
  const uint64_t own_best = best;  // 0 without tokens
  best = greatest(best, shared);
  if (temperature > 0.f) {
    const float highest = from_ordered(static_cast<unsigned>(best >> 32));
    const float scale = 1.4426950408889634f / fmaxf(temperature, 1e-6f);
    const auto weigh = [&](float s) { return exp2f((s - highest) * scale); };  // nothing beyond the vocabulary
    if constexpr (HELD) {
#pragma unroll
      for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
        for (int i = 0; i < 4; ++i) held[group][i] = weigh(held[group][i]);
      }
    }
    const auto weights = [&](int group, float (&p)[4]) {
      if constexpr (HELD) {
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = held[group][i];
      } else {
        read_logits(group, p);
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = weigh(p[i]);
      }
    };
    int turn = 0;
    // Over the block, in every thread.
    const auto total = [&](Tally mine) {
      Tally(&all)[WARPS] = tallies[turn++ % 2];  // a warp that is ahead writes into the other one
      mine = {__reduce_add_sync(ALL_LANES, mine.count), sum_over_lanes<32>(mine.mass)};
      if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = mine;
      __syncthreads();
      mine = threadIdx.x % 32 < WARPS ? all[threadIdx.x % 32] : Tally{0, 0.f};
      return Tally{__reduce_add_sync(ALL_LANES, mine.count), sum_over_lanes<32>(mine.mass)};
    };
    // The tokens of this thread that reach a threshold, and their mass.
    const auto reached = [&](unsigned threshold) {
      Tally mine = {0, 0.f};
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        float p[4];
        weights(group, p);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const bool reaches = __float_as_uint(p[i]) >= threshold;
          mine.count += reaches;
          mine.mass += reaches ? p[i] : 0.f;
        }
      }
      return mine;
    };
    const auto tally = [&](unsigned threshold) { return total(reached(threshold)); };
    const auto words_of = [&](int token) {
      const uint2 key = {static_cast<unsigned>(a.whole[1]), static_cast<unsigned>(a.whole[2] + row)};
      return philox({static_cast<unsigned>(token) / 4, static_cast<unsigned>(position), 0, 0}, key);
    };
    const bool by_count = top_k > 0 && top_k < a.vocab, by_mass = top_p < 1.f;
    const int64_t least = by_count ? top_k : THREADS / 2;
    bool drawn = false;
    uint64_t winner = 0;
    if ((by_count || by_mass) && least <= THREADS / 2) {
      const unsigned largest =
          own_best == 0 ? 0u : __float_as_uint(weigh(from_ordered(static_cast<unsigned>(own_best >> 32))));
      unsigned bound = 0, above = __float_as_uint(1.f) + 1;  // enough threads reach it; too few do
      int reaching = THREADS;
      while (above - bound > 1 && reaching > least + SLACK) {
        const unsigned middle = bound + (above - bound) / 2;
        const int count = __syncthreads_count(largest >= middle);
        if (count >= least) {
          bound = middle;
          reaching = count;
        } else {
          above = middle;
        }
      }
      bound = max(bound, 1u);
      const Tally mine = reached(bound), all = total(mine);
      const float everything = by_count || !by_mass ? 0.f : tally(1).mass;
      if (all.count <= THREADS && (by_count || all.mass >= top_p * everything)) {
        int end = mine.count;  // of the thread's candidates, which lie in the order of threads and tokens
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
          const int before = __shfl_up_sync(ALL_LANES, end, offset);
          if (threadIdx.x % 32 >= offset) end += before;
        }
        Tally(&of_warps)[WARPS] = tallies[turn++ % 2];
        if (threadIdx.x % 32 == 31) of_warps[threadIdx.x / 32].count = end;
        __syncthreads();
        const bool warp_before = threadIdx.x % 32 < threadIdx.x / 32;
        const int at_warp = __reduce_add_sync(ALL_LANES, warp_before ? of_warps[threadIdx.x % WARPS].count : 0);
        int at = at_warp + end - mine.count;
#pragma unroll
        for (int group = 0; group < groups; ++group) {
          float p[4];
          weights(group, p);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (__float_as_uint(p[i]) < bound) continue;
            candidate_p[at] = p[i];
            candidate_token[at++] = first_of(group) + i;
          }
        }
        __syncthreads();
        const bool there = static_cast<int>(threadIdx.x) < all.count;
        const float p = there ? candidate_p[threadIdx.x] : 0.f;
        Tally higher = {0, 0.f};
        if (there) {
          for (int other = 0; other < all.count; ++other) {
            const float q = candidate_p[other];
            higher.count += q > p;
            higher.mass += q > p ? q : 0.f;
          }
        }
        bool kept = there && (!by_count || higher.count < top_k);
        if (by_mass) {
          const float mass = by_count ? total({0, kept ? p : 0.f}).mass : everything;
          kept = kept && (higher.count == 0 || higher.mass < top_p * mass);
        }
        if (kept) {
          const int token = candidate_token[threadIdx.x];
          const uint4 words = words_of(token);
          const unsigned low = token & 1 ? words.y : words.x, high = token & 1 ? words.w : words.z;
          winner = rank_in_race(p, token & 2 ? high : low, token);
        }
        drawn = true;
      }
    }
    if (!drawn) {
      // The largest threshold that is enough, `low` being so; all reach 0, none `high`.
      const auto search = [&](unsigned low, int count_low, auto enough) {
        unsigned high = __float_as_uint(1.f) + 1;
        int count_high = 0;
        while (high - low > 1 && count_low - count_high > 1) {
          const unsigned middle = low + (high - low) / 2;
          const Tally found = tally(middle);
          if (enough(found)) {
            low = middle;
            count_low = found.count;
          } else {
            high = middle;
            count_high = found.count;
          }
        }
        return low;
      };
      unsigned threshold = 1;  // above 0
      if (by_count) {
        threshold = max(threshold, search(0, a.vocab, [&](const Tally& found) { return found.count >= top_k; }));
      }
      if (by_mass) {
        const Tally kept = tally(threshold);
        const float wanted = top_p * kept.mass;
        threshold = search(threshold, kept.count, [&](const Tally& found) { return found.mass >= wanted; });
      }
#pragma unroll
      for (int group = 0; group < groups; ++group) {
        float p[4];
        weights(group, p);
        const int first = first_of(group);
        bool any = false;
#pragma unroll
        for (int i = 0; i < 4; ++i) any |= __float_as_uint(p[i]) >= threshold;
        if (!any) continue;
        const uint4 bits = words_of(first);
        const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (__float_as_uint(p[i]) < threshold) continue;
          const uint64_t rank = rank_in_race(p[i], words[i], first + i);
          if (rank > winner) winner = rank;
        }
      }
    }
    best = greatest(winner, shared);
  }
  if (threadIdx.x == 0) {
    a.token[row] = static_cast<int64_t>(~static_cast<unsigned>(best));
    a.position[row] = position;
  }
}

}  // namespace

cudaError_t decode_embed_(cudaStream_t stream, View token, View position, View table, std::optional<View> learned,
                          Out x) {
  const int batch = check_batch(x, "x");
  const int64_t d = x.sizes[1];
  REQUIRE(table.dims == 2, "table must be [vocabulary, d], not ", shape(table));
  check_dense(x, "x", x, {batch, d});
  check_dense(table, "table", x, {table.sizes[0], d});
  if (learned) {
    REQUIRE(learned->dims == 2, "learned must be [positions, d], not ", shape(*learned));
    check_dense(*learned, "learned", x, {learned->sizes[0], d});
  }
  check(token, "token", x, {batch}, Type::int64);
  check(position, "position", x, {batch}, Type::int64);
  const DecodeEmbedding a = {token.as<int64_t>(), position.as<int64_t>(), table.data,
                             learned ? learned->data : nullptr, x.out(), static_cast<int>(d)};
  return launch_chained(embed, a, batch, 256, 1, stream);
}

cudaError_t decode_sample_(cudaStream_t stream, View logits, View real, View whole, int64_t last, Out position,
                           Out token) {
  const int batch = check_batch(logits, "logits");
  const int64_t vocab = logits.sizes[1];
  REQUIRE(vocab >= 1 && vocab <= MOST_TOKENS, "logits has ", vocab, " columns; at least 1, at most ", MOST_TOKENS);
  check_dense(logits, "logits", logits, {batch, vocab}, Type::float32);
  check_dense(real, "real", logits, {2}, Type::float32);
  check(whole, "whole", logits, {3}, Type::int64);
  check(position, "position", logits, {batch}, Type::int64);
  check(token, "token", logits, {batch}, Type::int64);
  const DecodeSample a = {logits.as<float>(),      real.as<float>(),      whole.as<int64_t>(),
                          position.out<int64_t>(), token.out<int64_t>(), last,
                          static_cast<int>(vocab)};
  const bool held = vocab <= 4 * THREADS * GROUPS;
  return launch_chained(held ? sample<true> : sample<false>, a, batch, THREADS, 1, stream);
}

}  // namespace mtlm
