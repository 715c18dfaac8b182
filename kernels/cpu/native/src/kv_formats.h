// One head's key or value of one token as it lies in the cache (reference/kv_formats.py), and as numbers.
//
//     x [dim] ──encode──▶ codes, scale in the pages ──▶ decode_rows ──▶ codes as numbers; whoever sums them multiplies
//
// Codes are exact in bf16 (8 bits, 4 bits less 7.5, e4m3), so are what a model in bf16 writes as fp16. Scales stay
// outside: a key's goes to its score, a value's to its weight.

struct fp16 {
  std::uint16_t bits;
};

typedef std::int8_t i8x16 __attribute__((vector_size(16)));
typedef std::uint8_t u8x16 __attribute__((vector_size(16)));

// 2^112 is between the exponents' biases; multiplied, subnormals come out right.
INLINE f32x16 to_float(u16x16 halves) {
#if HAS_AVX512
  return (f32x16)_mm512_cvtph_ps((__m256i)halves);
#else
  const u32x16 bits = __builtin_convertvector(halves, u32x16), size = (bits & 0x7fffu) << 13;
  const u32x16 finite = (u32x16)((f32x16)size * 0x1p112f), other = size | 0x7f800000u;  // infinity, NaN
  return (f32x16)((size >= 0x0f800000u ? other : finite) | (bits & 0x8000u) << 16);
#endif
}

// To nearest, ties to even. Below 2^-14 an addition of 1/2 rounds to multiples of 2^-24.
INLINE u16x16 to_half(f32x16 v) {
#if HAS_AVX512
  return (u16x16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#else
  const u32x16 bits = (u32x16)v, size = bits & 0x7fffffffu;
  const u32x16 normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  const u32x16 small = (u32x16)((f32x16)size + 0.5f) - 0x3f000000u;
  const u32x16 large = size > 0x7f800000u ? u32x16{} + 0x7e00u : u32x16{} + 0x7c00u;
  const u32x16 found = size < 0x38800000u ? small : size < 0x477ff000u ? normal : large;
  return __builtin_convertvector(found | (bits >> 16 & 0x8000u), u16x16);
#endif
}

INLINE f32x16 load(const fp16* p) {
  u16x16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return to_float(v);
}

INLINE void store(fp16* p, f32x16 v) {
  const u16x16 b = to_half(v);
  __builtin_memcpy(p, &b, sizeof b);
}

constexpr i64 row_bytes(i64 format, i64 dim) {
  switch (format) {
    case kKvFloat32:
      return 4 * dim;
    case kKvInt4:
      return dim / 2;
    case kKvInt8:
    case kKvFp8:
      return dim;
    default:
      return 2 * dim;
  }
}

constexpr bool has_token_scales(i64 format) { return format == kKvInt8 || format == kKvInt4; }

// x * H / sqrt(size) in place, size a power of two: stage by stage as reference/hadamard.py, so with the same
// roundings.
INLINE void turn(float* x, i64 size) {
  for (i64 half = 1; half < size; half *= 2) {
    if (half >= kLanes) {
      for (i64 i = 0; i < size; i += 2 * half)
        for (i64 j = i; j < i + half; j += kLanes) {
          const f32x16 a = load(x + j), b = load(x + j + half);
          store(x + j, a + b);
          store(x + j + half, a - b);
        }
      continue;
    }
    for (i64 i = 0; i < size; i += 2 * half)
      for (i64 j = i; j < i + half; ++j) {
        const float a = x[j], b = x[j + half];
        x[j] = a + b;
        x[j + half] = a - b;
      }
  }
  const float factor = (float)(1 / __builtin_sqrt((double)size));
  for (i64 i = 0; i < size; ++i) x[i] *= factor;
}

// To nearest, ties to even, for |x| < 2^22.
INLINE f32x16 nearest(f32x16 x) { return (x + 12582912.0f) - 12582912.0f; }

// Rows have room for whole vectors, filled with zeros behind dim.
INLINE i64 whole_vectors(i64 dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

constexpr float kLeastScale = 0x1p-14f, kMostScale = 65504.0f;

// max |x| / levels as fp16. Sizes compare as integers, among which NaN is the largest.
INLINE float token_scale(const float* x, i64 dim, float levels) {
  i32x16 sizes{};
  for (i64 d = 0; d < dim; d += kLanes) {
    const i32x16 size = (i32x16)load(x + d) & 0x7fffffff;
    sizes = size > sizes ? size : sizes;
  }
  std::int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = sizes[i] > most ? sizes[i] : most;
  float scale;
  __builtin_memcpy(&scale, &most, sizeof scale);
  scale /= levels;
  return scale < kLeastScale ? kLeastScale : scale > kMostScale ? kMostScale : scale;
}

INLINE f32x16 clamp(f32x16 x, float low, float high) { return x < low ? splat(low) : x > high ? splat(high) : x; }

// e4m3: bias 7, subnormals in units of 2^-9, NaN 0x7f.
INLINE u32x16 to_fp8(f32x16 x) {
  const f32x16 v = clamp(x, -448.0f, 448.0f);
  const u32x16 bits = (u32x16)v, size = bits & 0x7fffffffu;
  const u32x16 normal = (size - 0x3c000000u + 0x7ffffu + ((size >> 20) & 1u)) >> 20;
  const u32x16 small = (u32x16)((f32x16)size + 16384.0f) - 0x46800000u;
  const u32x16 found = v != v ? u32x16{} + 0x7fu : size < 0x3c800000u ? small : normal;
  return found | (bits >> 24 & 0x80u);
}

// As fp16 they are 2^8 times smaller, subnormals included.
INLINE f32x16 from_fp8(u16x16 codes) {
  const u16x16 size = codes << 7 & 0x3f80u, sign = codes << 8 & 0x8000u;
  return to_float((size == 0x3f80u ? u16x16{} + 0x7e00u : size) | sign) * 256.0f;
}

// codes[i] = f(x + 16 i), a byte per lane.
template <class F>
INLINE void byte_codes(const float* x, i64 dim, std::uint8_t* codes, F f) {
  for (i64 d = 0; d < dim; d += kLanes) {
    const u8x16 some = __builtin_convertvector(f(load(x + d)), u8x16);
    __builtin_memcpy(codes + d, &some, sizeof some);
  }
}

// One head to its place in the pages, and its scale where tokens have one. `row`: whole vectors of fp32 that hold the
// head (turned already where that is the format), `bytes`: as many codes.
static void encode(i64 format, const float* row, i64 dim, float static_scale, std::uint8_t* bytes, void* codes,
                   std::uint16_t* scale) {
  switch (format) {
    case kKvFloat32:
      __builtin_memcpy(codes, row, dim * sizeof(float));
      return;
    case kKvBfloat16:
      copy_row(row, (bf16*)codes, dim);
      return;
    case kKvFloat16:
      copy_row(row, (fp16*)codes, dim);
      return;
    case kKvFp8:
      byte_codes(row, dim, bytes, [&](f32x16 x) { return to_fp8(x / static_scale); });
      __builtin_memcpy(codes, bytes, dim);
      return;
  }
  const bool eight = format == kKvInt8;
  const u16x16 stored = to_half(splat(token_scale(row, dim, eight ? 127.0f : 7.5f)));
  const f32x16 divisor = to_float(stored);
  *scale = stored[0];
  if (eight) {
    byte_codes(row, dim, bytes,
               [&](f32x16 x) { return __builtin_convertvector(nearest(clamp(x / divisor, -127.0f, 127.0f)), i32x16); });
    __builtin_memcpy(codes, bytes, dim);
    return;
  }
  byte_codes(row, dim, bytes, [&](f32x16 x) {
    return __builtin_convertvector(nearest(clamp(x / divisor + 7.5f, 0.0f, 15.0f)), i32x16);
  });
  for (i64 i = 0; i < dim / 2; ++i) ((std::uint8_t*)codes)[i] = (std::uint8_t)(bytes[i] | bytes[i + dim / 2] << 4);
}

INLINE u16x16 load_bytes(const void* p) {
#if HAS_AVX512  // the portable form becomes many instructions
  return (u16x16)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
  u8x16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, u16x16);
#endif
}

INLINE f32x16 load_int8(const void* p) {
#if HAS_AVX512
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
  i8x16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(__builtin_convertvector(v, i32x16), f32x16);
#endif
}

// out[i] = f(rows[i], d), 16 numbers from column d on.
template <class Out, class F>
INLINE void each_row(const void* const* rows, i64 count, i64 dim, i64 stride, Out* out, F f) {
  for (i64 i = 0; i < count; ++i)
    for (i64 d = 0; d < dim; d += kLanes) store(out + i * stride + d, f(rows[i], d));
}

// Four bits each.
INLINE f32x16 from_int4(u16x16 codes) {
#if HAS_AVX512
  return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32((__m256i)codes)) - 7.5f;
#else
  return __builtin_convertvector(__builtin_convertvector(codes, i32x16), f32x16) - 7.5f;
#endif
}

// The codes of `count` heads as numbers, without their scales; dim is a multiple of 16.
template <class Out>
static void decode_rows(i64 format, const void* const* rows, i64 count, i64 dim, i64 stride, Out* out) {
  switch (format) {
    case kKvFloat32:
      return each_row(rows, count, dim, stride, out, [](const void* p, i64 d) { return load((const float*)p + d); });
    case kKvBfloat16:
      return each_row(rows, count, dim, stride, out, [](const void* p, i64 d) { return load((const bf16*)p + d); });
    case kKvFloat16:
      return each_row(rows, count, dim, stride, out, [](const void* p, i64 d) { return load((const fp16*)p + d); });
    case kKvFp8:
      return each_row(rows, count, dim, stride, out,
                      [](const void* p, i64 d) { return from_fp8(load_bytes((const char*)p + d)); });
    case kKvInt8:
      return each_row(rows, count, dim, stride, out,
                      [](const void* p, i64 d) { return load_int8((const char*)p + d); });
  }
  const i64 half = dim / 2;
  for (i64 i = 0; i < count; ++i) {
    const std::uint8_t* const codes = (const std::uint8_t*)rows[i];
    Out* const row = out + i * stride;
    if (half < kLanes) {
      std::uint8_t twice[kLanes];
      __builtin_memcpy(twice, codes, half);
      __builtin_memcpy(twice + half, codes, half);
      const u16x16 shift = {0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4};
      store(row, from_int4(load_bytes(twice) >> shift & 15u));
      continue;
    }
    for (i64 d = 0; d < half; d += kLanes) {
      const u16x16 both = load_bytes(codes + d);
      store(row + d, from_int4(both & 15u));
      store(row + half + d, from_int4(both >> 4));
    }
  }
}

#if HAS_AMX
// The same for the formats whose codes become bf16 by a few instructions, 32 at a time.

// Sign-extended words in pairs become two numbers below 2^7, which are their own upper halves.
INLINE __m512i bf16_of_int8(__m256i codes) {
  const __m512i words = _mm512_cvtepi8_epi16(codes);
  const __m512i odd = (__m512i)_mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16));
  const __m512i even = (__m512i)_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16));
  return _mm512_or_si512(odd, _mm512_srli_epi32(even, 16));
}

// Exponents are 120 apart; the eight smallest sizes, 0 and the subnormal, are looked up.
INLINE __m512i bf16_of_fp8(__m256i codes) {
  const __m512i words = _mm512_cvtepu8_epi16(codes), size = _mm512_and_si512(words, _mm512_set1_epi16(0x7f));
  const __m512i small = _mm512_broadcast_i32x4(
      _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));  // in units of 2^-9
  const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(size, 4), _mm512_set1_epi16(0x3c00));
  const __mmask32 is_small = _mm512_testn_epi16_mask(size, _mm512_set1_epi16(0x78));
  const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(size, _mm512_set1_epi16(0x7f));
  __m512i found = _mm512_mask_permutexvar_epi16(normal, is_small, size, small);
  found = _mm512_mask_mov_epi16(found, is_nan, _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(found, _mm512_and_si512(_mm512_slli_epi16(words, 8), _mm512_set1_epi16((short)0x8000)));
}

// -7.5, -6.5 ... 7.5, twice.
INLINE __m512i bf16_of_int4(__m512i codes) {
  const __m512i numbers = _mm512_broadcast_i64x4(
      _mm256_setr_epi16((short)0xc0f0, (short)0xc0d0, (short)0xc0b0, (short)0xc090, (short)0xc060, (short)0xc020,
                        (short)0xbfc0, (short)0xbf00, 0x3f00, 0x3fc0, 0x4020, 0x4060, 0x4090, 0x40b0, 0x40d0, 0x40f0));
  return _mm512_permutexvar_epi16(codes, numbers);
}

// f(32 bytes of a head, where they begin, a bit for each that is).
template <class F>
INLINE void each_bytes(const void* const* rows, i64 count, i64 bytes, F f) {
  for (i64 i = 0; i < count; ++i)
    for (i64 d = 0; d < bytes; d += 32) {
      const __mmask32 there = bytes - d >= 32 ? ~0u : (1u << (bytes - d)) - 1;
      f(_mm256_maskz_loadu_epi8(there, (const char*)rows[i] + d), i, d, there);
    }
}

static void decode_tiles(i64 format, const void* const* rows, i64 count, i64 dim, i64 stride, bf16* out) {
  const auto put = [&](i64 i, i64 d, __mmask32 there, __m512i v)
                       __attribute__((always_inline)) { _mm512_mask_storeu_epi16(out + i * stride + d, there, v); };
  switch (format) {
    case kKvInt8:
      return each_bytes(rows, count, dim,
                        [&](__m256i codes, i64 i, i64 d, __mmask32 there)
                            __attribute__((always_inline)) { put(i, d, there, bf16_of_int8(codes)); });
    case kKvFp8:
      return each_bytes(rows, count, dim,
                        [&](__m256i codes, i64 i, i64 d, __mmask32 there)
                            __attribute__((always_inline)) { put(i, d, there, bf16_of_fp8(codes)); });
    case kKvInt4:
      return each_bytes(rows, count, dim / 2,
                        [&](__m256i codes, i64 i, i64 d, __mmask32 there) __attribute__((always_inline)) {
                          const __m512i both = _mm512_cvtepu8_epi16(codes);
                          put(i, d, there, bf16_of_int4(both));  // looks at the low bits alone
                          put(i, dim / 2 + d, there, bf16_of_int4(_mm512_srli_epi16(both, 4)));
                        });
    case kKvBfloat16:
      for (i64 i = 0; i < count; ++i) __builtin_memcpy(out + i * stride, rows[i], dim * sizeof(bf16));
      return;
    default:
      return decode_rows(format, rows, count, dim, stride, out);
  }
}
#endif
