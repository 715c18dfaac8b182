// Rows in eight bits. What makes them, a norm or a gated activation, leaves fp32 in the first cache; the largest of
// each group is found there, and the codes are written once.

struct s8 {
  std::int8_t code;
};

struct e4m3 {
  std::uint8_t bits;  // sign, 4 of exponent with bias 7, 3 of mantissa; no infinity
};

typedef std::uint8_t u8x16 __attribute__((vector_size(16)));

constexpr float largest_code(s8) { return 127.0f; }
constexpr float largest_code(e4m3) { return 448.0f; }

// The low byte of each lane.
INLINE void store_bytes(void* p, u32x16 v) {
#if HAS_AVX512  // the portable form goes byte by byte
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
  const u8x16 bytes = __builtin_convertvector(v, u8x16);
  __builtin_memcpy(p, &bytes, sizeof bytes);
#endif
}

INLINE f32x16 clamp(f32x16 v, float limit) { return min(max(v, splat(-limit)), splat(limit)); }

// To nearest even, as the integer that adding 1.5 * 2^23 leaves in the low bits. NaN, which int8 has not, is -127.
INLINE void store(s8* p, f32x16 v) { store_bytes(p, (u32x16)(clamp(v, 127.0f) + 12582912.0f)); }

// To nearest even. Below 2^-6 the grid is even, its step 2^-9 that of fp32 at 2^14: adding that rounds.
INLINE void store(e4m3* p, f32x16 v) {
  constexpr std::uint32_t kRebias = (127 - 7) << 23, kLeast = (127 - 6) << 23;
  constexpr float kGrid = 16384.0f;
  const u32x16 sign = (u32x16)v & 0x80000000u, size = (u32x16)clamp(v, 448.0f) & 0x7fffffffu;
  const u32x16 normal = (size - kRebias + 0x7ffffu + (size >> 20 & 1u)) >> 20;
  const u32x16 tiny = (u32x16)((f32x16)size + kGrid) - (u32x16)splat(kGrid);
  const u32x16 code = v == v ? (u32x16)(size < kLeast ? tiny : normal) : u32x16{} + 0x7fu;
  store_bytes(p, code | sign >> 24);
}

enum CodeKind : i64 { kS8 = 0, kE4m3 = 1 };  // the codes that rows.py passes

struct Codes {
  i64 kind, group;     // inputs per scale
  const float* fixed;  // null, or the scale of all
  void* codes;         // [rows, width]
  float* scales;       // [rows, groups]
};

// Of n values. As integers their sizes are ordered alike, and NaN is above all: a group that has one has it as scale.
INLINE float largest_size(const float* values, i64 n) {
  u32x16 top{};
  for_lanes(n, [&](auto at, auto) {
    const u32x16 size = (u32x16)at(values) & 0x7fffffffu;
    top = size > top ? size : top;
  });
  std::uint32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = top[i] > most ? top[i] : most;
  float size;
  __builtin_memcpy(&size, &most, sizeof size);
  return size;
}

template <class Code>
static void encode(const float* values, i64 row, i64 width, const Codes& to) {
  const i64 groups = (width + to.group - 1) / to.group;
  for (i64 g = 0; g < groups; ++g) {
    const i64 first = g * to.group, n = width - first < to.group ? width - first : to.group;
    float scale = to.fixed ? *to.fixed : largest_size(values + first, n) / largest_code(Code{});
    if (scale == 0) scale = 1;
    to.scales[row * groups + g] = scale;
    Code* const codes = (Code*)to.codes + row * width + first;
    for_lanes(n, [&](auto at, auto put) { put(codes, at(values + first) / scale); });
  }
}

// Each row of `width` values by make(row, values), encoded; cost: of an element, in those that are only read.
template <class F>
INLINE i64 encode_rows(i64 rows, i64 width, i64 cost, const Codes& to, Worker& worker, F make) {
  float* const values = (float*)worker.scratch(4 * width);
  if (!values) return kOutOfMemory;
  for (Worker::Range r; worker.next(r, rows, piece(cost * width));)
    for (i64 row = r.first; row < r.last; ++row) {
      make(row, values);
      if (to.kind == kS8)
        encode<s8>(values, row, width, to);
      else
        encode<e4m3>(values, row, width, to);
    }
  return kDone;
}

struct Quantize {
  i64 rows, dtype;
  const void* x;
  i64 x_row, width;
  Codes to;
};

static i64 quantize(const Quantize& q, Worker& worker) {
  return encode_rows(q.rows, q.width, 2, q.to, worker, [&](i64 row, float* values) {
    with_dtype(q.dtype, [&](auto x) { copy_row((const decltype(x)*)q.x + row * q.x_row, values, q.width); });
  });
}

struct NormCodes {
  Norm norm;  // of one head, without an `out`
  Codes to;
};

static i64 norm_codes(const NormCodes& n, Worker& worker) {
  return encode_rows(n.norm.rows, n.norm.dim, 3, n.to, worker, [&](i64 row, float* values) {
    with_dtype(n.norm.dtype, [&](auto x) {
      with_dtype(n.norm.weight_dtype, [&](auto w) { norm_row<decltype(x), decltype(w)>(n.norm, row, values); });
    });
  });
}

struct GateCodes {
  Gate gate;  // without an `out`
  Codes to;
};

static i64 gate_codes(const GateCodes& g, Worker& worker) {
  return encode_rows(g.gate.rows, g.gate.width, 6, g.to, worker, [&](i64 row, float* values) {
    with_dtype(g.gate.dtype, [&](auto x) { gate_row<decltype(x)>(g.gate, row, 0, g.gate.width, values); });
  });
}
