// Vectors of 16 fp32 lanes in the compiler's portable notation: one register with AVX-512, two with AVX2, four with
// SSE or NEON. Included inside a namespace of its own for each instruction set.

typedef float f32x16 __attribute__((vector_size(64)));
typedef std::int32_t i32x16 __attribute__((vector_size(64)));
typedef std::uint32_t u32x16 __attribute__((vector_size(64)));
typedef std::uint16_t u16x16 __attribute__((vector_size(32)));

constexpr i64 kLanes = 16;
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = __builtin_inff();

INLINE f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

INLINE f32x16 load(const float* p) {
  f32x16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// 16 halves of words, each in the low half of a lane.
INLINE u32x16 load_halves(const bf16* p) {
  u16x16 v;
  __builtin_memcpy(&v, p, sizeof v);
#if HAS_AVX512  // the portable form becomes two conversions of eight
  return (u32x16)_mm512_cvtepu16_epi32((__m256i)v);
#else
  return __builtin_convertvector(v, u32x16);
#endif
}

INLINE f32x16 load(const bf16* p) { return (f32x16)(load_halves(p) << 16); }

INLINE void store(float* p, f32x16 v) { __builtin_memcpy(p, &v, sizeof v); }

// To nearest, ties to even; NaN stays NaN.
INLINE u16x16 to_bf16(f32x16 v) {
#if HAS_AMX
  return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
  const u32x16 bits = (u32x16)v;
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : u32x16{} + 0x7fc0u, u16x16);
#endif
}

INLINE void store(bf16* p, f32x16 v) {
  const u16x16 b = to_bf16(v);
  __builtin_memcpy(p, &b, sizeof b);
}

// a * b + c, rounded once where the processor can. Written out everywhere it is meant, and the compiler is told not to
// contract on its own: it would do so differently where the same sum stands in two places.
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if HAS_AVX512
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif HAS_AVX2
  union Halves {
    f32x16 whole;
    __m256 half[2];
  } x{a}, y{b}, z{c};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.whole;
#else
  return a * b + c;
#endif
}

// The last n < 16 elements of a row: lanes beyond them read as zero and are not written.
template <class T>
INLINE f32x16 load_some(const T* p, i64 n) {
  T lanes[kLanes] = {};
  for (i64 i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}

template <class T>
INLINE void store_some(T* p, f32x16 v, i64 n) {
  T lanes[kLanes];
  store(lanes, v);
  for (i64 i = 0; i < n; ++i) p[i] = lanes[i];
}

// f(index, load, store) over a row in steps of 16, the rest included.
template <class F>
INLINE void for_lanes(i64 n, F f) {
  i64 i = 0;
  for (; i + kLanes <= n; i += kLanes)
    f([i](auto* p) __attribute__((always_inline)) { return load(p + i); },
      [i](auto* p, f32x16 v) __attribute__((always_inline)) { store(p + i, v); });
  if (const i64 rest = n - i)
    f([i, rest](auto* p) __attribute__((always_inline)) { return load_some(p + i, rest); },
      [i, rest](auto* p, f32x16 v) __attribute__((always_inline)) { store_some(p + i, v, rest); });
}

// b where either is NaN. The compiler makes a comparison and a choice of the portable form.
INLINE f32x16 max(f32x16 a, f32x16 b) {
#if HAS_AVX512
  return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}
INLINE f32x16 min(f32x16 a, f32x16 b) {
#if HAS_AVX512
  return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

INLINE float sum_lanes(f32x16 v) {
#if HAS_AVX512
  return _mm512_reduce_add_ps((__m512)v);
#else
  float x[8];
  for (int i = 0; i < 8; ++i) x[i] = v[i] + v[i + 8];
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
#endif
}

INLINE float max_lanes(f32x16 v) {
#if HAS_AVX512
  return _mm512_reduce_max_ps((__m512)v);
#else
  float x = v[0];
  for (int i = 1; i < kLanes; ++i) x = x < v[i] ? v[i] : x;
  return x;
#endif
}

INLINE bool any_above(f32x16 v, float x) {
#if HAS_AVX512
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(x), _CMP_GT_OQ) != 0;
#else
  return max_lanes(v) > x;
#endif
}

// 2^x for x < 127, and 0 below -126: Cody and Waite's split into 2^k * 2^r with |r| <= 1/2, and the polynomial of
// degree 5 with the least relative error, 9e-8. Adding 1.5 * 2^23 rounds to an integer that is left in the low bits.
INLINE f32x16 exp2(f32x16 x) {
  constexpr float kRound = 12582912.0f;
  const f32x16 shifted = x + kRound;
  const f32x16 r = x - (shifted - kRound);
  f32x16 p = splat(0.0013264735462144017f);
  constexpr float kRest[] = {0.00967151764780283f, 0.05550733953714371f, 0.24022242426872253f, 0.6931470036506653f,
                             1.0f};
  for (float c : kRest) p = fma(p, r, splat(c));
  const u32x16 exponent = (u32x16)shifted << 23;
  return x < -126.0f ? f32x16{} : (f32x16)((u32x16)p + exponent);
}

INLINE float exp2(float x) { return exp2(splat(x))[0]; }

INLINE f32x16 reciprocal(f32x16 x) {
#if HAS_AVX512  // a guess of 14 bits and one step of Newton's: a division takes twice as long
  const f32x16 guess = (f32x16)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// 1 / (1 + exp(-x)); 2^126 stands in for anything larger, so that the result fades to 1e-38 and never to NaN.
INLINE f32x16 sigmoid(f32x16 x) { return reciprocal(1.0f + exp2(min(x * -kLog2E, splat(126.0f)))); }

// 2 sigmoid(2x) - 1, and near 0, where that cancels, the series to x^7.
INLINE f32x16 tanh(f32x16 x) {
  const f32x16 s = x * x;
  const f32x16 near = x * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315))));
  return s < 0.0625f ? near : 2.0f * sigmoid(2.0f * x) - 1.0f;
}

// Lanes j with bit j set keep their value, the others become -inf.
INLINE f32x16 keep(f32x16 v, std::uint32_t bits) {
#if HAS_AVX512
  return (f32x16)_mm512_mask_mov_ps(_mm512_set1_ps(-kInfinity), (__mmask16)bits, (__m512)v);
#else
  const u32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return ((((u32x16{} + bits) >> lane) & 1u) != 0) ? v : splat(-kInfinity);
#endif
}

template <class From, class To>
INLINE void copy_row(const From* from, To* to, i64 count) {
  if constexpr (sizeof(From) == sizeof(To))
    __builtin_memcpy(to, from, count * sizeof(To));
  else
    for_lanes(count, [&](auto at, auto put) { put(to, at(from)); });
}
