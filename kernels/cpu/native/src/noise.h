// Noise as a function of where it is used: the words of kernels/reference/noise.py, 64 columns at a time.

struct Source {  // of one row's noise
  std::uint32_t key[2], position, sample_index, purpose;
};

INLINE Source source_of(i64 seed, i64 sample_index, i64 position, std::uint32_t purpose) {
  std::uint64_t mixed = (std::uint64_t)seed;  // the finaliser of SplitMix64
  mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBu;
  mixed ^= mixed >> 31;
  return {{(std::uint32_t)mixed, (std::uint32_t)(mixed >> 32)},
          (std::uint32_t)position,
          (std::uint32_t)sample_index,
          purpose};
}

struct Product {
  u32x16 low, high;
};

INLINE Product multiply(u32x16 a, std::uint32_t factor) {
#if HAS_AVX512  // the processor multiplies every second lane
  const __m512i f = _mm512_set1_epi64(factor);
  const __m512i even = _mm512_mul_epu32((__m512i)a, f), odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), f);
  return {(u32x16)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA),
          (u32x16)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB)};
#else
  Product p;
  for (int i = 0; i < kLanes; ++i) {
    const std::uint64_t whole = (std::uint64_t)a[i] * factor;
    p.low[i] = (std::uint32_t)whole;
    p.high[i] = (std::uint32_t)(whole >> 32);
  }
  return p;
#endif
}

// Ten rounds of Philox-4x32 on 16 counters, in place.
INLINE void philox(u32x16 (&c)[4], const std::uint32_t (&key)[2]) {
  std::uint32_t k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const Product left = multiply(c[0], 0xD2511F53u), right = multiply(c[2], 0xCD9E8D57u);
    c[0] = right.high ^ c[1] ^ k0;
    c[2] = left.high ^ c[3] ^ k1;
    c[1] = right.low;
    c[3] = left.low;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The words of columns 64 * group to 64 * group + 63, in their order.
INLINE void words_of(const Source& source, i64 group, u32x16 (&out)[4]) {
  // Lane 4 q + t holds counter 4 t + q, whose four words are columns 16 t + 4 q and on: transposing blocks of four
  // lanes puts them in place.
  constexpr u32x16 kCounters = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  u32x16 c[4] = {kCounters + (std::uint32_t)(16 * group), u32x16{} + source.position, u32x16{} + source.sample_index,
                 u32x16{} + source.purpose};
  philox(c, source.key);
#define QUIRE_INTERLEAVE(a, b, i, j)                                                                              \
  __builtin_shufflevector(a, b, i, 16 + i, j, 16 + j, 4 + i, 20 + i, 4 + j, 20 + j, 8 + i, 24 + i, 8 + j, 24 + j, \
                          12 + i, 28 + i, 12 + j, 28 + j)
#define QUIRE_JOIN(a, b, i)                                                                                           \
  __builtin_shufflevector(a, b, i, i + 1, 16 + i, 17 + i, 4 + i, 5 + i, 20 + i, 21 + i, 8 + i, 9 + i, 24 + i, 25 + i, \
                          12 + i, 13 + i, 28 + i, 29 + i)
  const u32x16 a = QUIRE_INTERLEAVE(c[0], c[1], 0, 1), b = QUIRE_INTERLEAVE(c[2], c[3], 0, 1);
  const u32x16 d = QUIRE_INTERLEAVE(c[0], c[1], 2, 3), e = QUIRE_INTERLEAVE(c[2], c[3], 2, 3);
  out[0] = QUIRE_JOIN(a, b, 0);
  out[1] = QUIRE_JOIN(a, b, 2);
  out[2] = QUIRE_JOIN(d, e, 0);
  out[3] = QUIRE_JOIN(d, e, 2);
#undef QUIRE_JOIN
#undef QUIRE_INTERLEAVE
}

// Words, rounded to fp32, to (0, 1).
INLINE f32x16 uniform(u32x16 words) {
  constexpr float kUnit = 1.0f / 4294967296.0f, kBelowOne = 1.0f - 1.0f / 16777216.0f;
  return min((__builtin_convertvector(words, f32x16) + 0.5f) * kUnit, splat(kBelowOne));
}

constexpr float kMostNoise = 22.9f;  // -log of the least uniform, 2^-33

// Gumbel noise -log(-log(1 - u)), rounded to fp32 where the reference is.
INLINE float gumbel(float u) {
  const float exponential = (float)-__builtin_log1p(-(double)u);
  return (float)-__builtin_log((double)exponential);
}

// At least the noise of u, at most 0.06 more where that is large: -log(u) by the chords of log2 that a number's bits
// are, with room for their rounding.
INLINE f32x16 noise_bound(f32x16 u) {
  const f32x16 bits = __builtin_convertvector((i32x16)u, f32x16);
  return fma(bits, splat(-kLn2 / 8388608.0f), splat(127 * kLn2 + 1e-4f));
}
