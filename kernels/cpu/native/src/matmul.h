// The two products of an attention tile, scores = keys * queries and o += values^T * weights, for 16 rows, a lane each:
//
//     keys [64][dim], as they lie · queries [dim][16] = scores [64][16]     values^T [dim][64] · weights [64][16] = o
//     [dim][16]
//
// Two ways: fp32 vectors, and bf16 matrix tiles where there is AMX. Every sum runs over its depth in order.

#if HAS_AVX512
typedef __m512i Words;  // four rows of a column of 4 x 4 blocks: quarter q belongs to row 4q + i
INLINE Words pick_words(const void* const* rows, int i, i64 column) {
  const auto quarter = [&](int row) __attribute__((always_inline)) {
    return _mm_loadu_si128((const __m128i*)((const std::uint32_t*)rows[row] + column));
  };
  Words z = _mm512_castsi128_si512(quarter(i));
  z = _mm512_inserti32x4(z, quarter(i + 4), 1);
  z = _mm512_inserti32x4(z, quarter(i + 8), 2);
  return _mm512_inserti32x4(z, quarter(i + 12), 3);
}
INLINE Words low_words(Words a, Words b) { return _mm512_unpacklo_epi32(a, b); }
INLINE Words high_words(Words a, Words b) { return _mm512_unpackhi_epi32(a, b); }
#else
typedef std::uint32_t Words __attribute__((vector_size(16)));
INLINE Words pick_words(const void* const* rows, int i, i64 column) {
  Words z;
  __builtin_memcpy(&z, (const std::uint32_t*)rows[i] + column, sizeof z);
  return z;
}
INLINE Words low_words(Words a, Words b) { return __builtin_shuffle(a, b, Words{0, 4, 1, 5}); }
INLINE Words high_words(Words a, Words b) { return __builtin_shuffle(a, b, Words{2, 6, 3, 7}); }
#endif

// out[c][i] = word c of rows[i], for 16 rows of `columns` 32-bit words, a multiple of 4; out's rows are out_row apart.
INLINE void transpose(const void* const* rows, i64 columns, std::uint32_t* out, i64 out_row) {
  constexpr i64 kAtOnce = sizeof(Words) / 4;
  for (i64 at = 0; at < kBlockRows; at += kAtOnce)
    for (i64 c = 0; c < columns; c += 4) {
      Words z[4];
      for (int i = 0; i < 4; ++i) z[i] = pick_words(rows + at, i, c);
      const Words a = low_words(z[0], z[2]), b = low_words(z[1], z[3]);
      const Words d = high_words(z[0], z[2]), e = high_words(z[1], z[3]);
      const Words turned[4] = {low_words(a, b), high_words(a, b), low_words(d, e), high_words(d, e)};
      for (int i = 0; i < 4; ++i) __builtin_memcpy(out + (c + i) * out_row + at, &turned[i], sizeof turned[i]);
    }
}

// Vectors of sums that fit in the registers together with what they are made from.
#if HAS_AVX512
constexpr int kSums = 16;
#elif HAS_AVX2
constexpr int kSums = 4;
#else
constexpr int kSums = 2;
#endif

// The keys of a tile: where each 16 begin, and how far a key is from the next.
template <class Operand>
struct KeysOf {
  const Operand* sixteen[kTileKeys / 16];
  i64 row;
};

// Everything in fp32.
struct VectorProduct {
  using Operand = float;  // of queries, keys, values and weights

  // Very large at least, where 2^x is.
  INLINE f32x16 power(f32x16 x) { return exp2(min(splat(126.0f), x)); }

  // Queries [16][dim] to [dim][16].
  INLINE void pack_queries(const float* rows, i64 dim, float* out) {
    const void* at[kBlockRows];
    for (i64 i = 0; i < kBlockRows; ++i) at[i] = rows + i * dim;
    transpose(at, dim, (std::uint32_t*)out, kBlockRows);
  }

  INLINE void keys(i64 format, const void* const* rows, i64 dim, i64 wide, float* out) {
    decode_rows(format, rows, kTileKeys, dim, wide, out);
  }

  INLINE void values(i64 format, const void* const* rows, i64 dim, float*, float* out) {
    decode_rows(format, rows, kTileKeys, dim, dim, out);
  }

  INLINE void scores(i64 dim, const KeysOf<float>& keys, const float* queries, float* out) {
    for (i64 j = 0; j < kTileKeys; j += kSums) {
      const float* const some = keys.sixteen[j / 16] + j % 16 * keys.row;
      f32x16 sum[kSums] = {};
      for (i64 d = 0; d < dim; ++d) {
        const f32x16 q = load(queries + d * kBlockRows);
        for (int i = 0; i < kSums; ++i) sum[i] = fma(splat(some[i * keys.row + d]), q, sum[i]);
      }
      for (int i = 0; i < kSums; ++i) store(out + (j + i) * kBlockRows, sum[i]);
    }
  }

  INLINE void put(float* weights, i64 key, f32x16 first, f32x16 second) {
    store(weights + key * kBlockRows, first);
    store(weights + (key + 1) * kBlockRows, second);
  }

  INLINE void add_values(i64 dim, const float* values, const float* weights, float* o) {
    for (i64 d = 0; d < dim; d += kSums) {
      f32x16 sum[kSums];
      for (int i = 0; i < kSums; ++i) sum[i] = load(o + (d + i) * kBlockRows);
      for (i64 j = 0; j < kTileKeys; ++j) {
        const f32x16 p = load(weights + j * kBlockRows);
        for (int i = 0; i < kSums; ++i) sum[i] = fma(splat(values[j * dim + d + i]), p, sum[i]);
      }
      for (int i = 0; i < kSums; ++i) store(o + (d + i) * kBlockRows, sum[i]);
    }
  }
};

#if HAS_AMX
// Tiles by numbers that are constants, not literals; and they read and write memory, which GCC 12's own do not say.
template <int Tile>
INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(Tile));
}

template <int Tile>
INLINE void load_tile(const void* p, i64 row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}

template <int Tile>
INLINE void store_tile(void* p, i64 row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}

// Sums += First * Second.
template <int Sums, int First, int Second>
INLINE void add_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(First), "i"(Second));
}

// bf16 tiles of 16 rows x 64 bytes. The second factor lies as pairs of rows: word [k / 2][n] holds rows k and k + 1.
struct TileProduct {
  using Operand = bf16;

  // 2^x to a relative 1e-4 (what follows is rounded to 2e-3), 1 at 0: 2^floor(x) times a polynomial in the rest.
  INLINE f32x16 power(f32x16 x) {
    constexpr int kFloor = 0x09;
    const f32x16 r = (f32x16)_mm512_reduce_ps((__m512)x, kFloor);
    f32x16 p = splat(0.0782679101f);
    constexpr float kRest[] = {0.226307625f, 0.695424465f, 1.0f};
    for (float c : kRest) p = fma(p, r, splat(c));
    return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)x);
  }

  // Queries [16][dim] to pairs [dim / 2][16].
  INLINE void pack_queries(const bf16* rows, i64 dim, bf16* out) {
    const void* at[kBlockRows];
    for (i64 i = 0; i < kBlockRows; ++i) at[i] = rows + i * dim;
    transpose(at, dim / 2, (std::uint32_t*)out, kBlockRows);
  }

  INLINE void keys(i64 format, const void* const* rows, i64 dim, i64 wide, bf16* out) {
    decode_tiles(format, rows, kTileKeys, dim, wide, out);
  }

  // To [dim][keys]: pairs of keys become words, which are transposed.
  INLINE void values(i64 format, const void* const* rows, i64 dim, bf16* between, bf16* out) {
    const void* decoded[kTileKeys];
    if (format != kKvBfloat16) {
      decode_tiles(format, rows, kTileKeys, dim, dim, between);
      for (i64 i = 0; i < kTileKeys; ++i) decoded[i] = between + i * dim;
      rows = decoded;
    }
    const auto pick = [&](i64 key, i64 column) __attribute__((always_inline)) {  // of keys 8 apart
      const auto quarter = [&](i64 q) __attribute__((always_inline)) {
        return _mm_loadu_si128((const __m128i*)((const bf16*)rows[key + 8 * q] + column));
      };
      Words z = _mm512_castsi128_si512(quarter(0));
      z = _mm512_inserti32x4(z, quarter(1), 1);
      z = _mm512_inserti32x4(z, quarter(2), 2);
      return _mm512_inserti32x4(z, quarter(3), 3);
    };
    for (i64 key = 0; key < kTileKeys; key += 32)
      for (i64 d = 0; d < dim; d += 8) {
        Words low[4], high[4];
        for (int i = 0; i < 4; ++i) {
          const Words even = pick(key + 2 * i, d), odd = pick(key + 2 * i + 1, d);
          low[i] = _mm512_unpacklo_epi16(even, odd);
          high[i] = _mm512_unpackhi_epi16(even, odd);
        }
        const auto turn = [&](const Words* z, bf16* to) __attribute__((always_inline)) {
          const Words a = low_words(z[0], z[2]), b = low_words(z[1], z[3]);
          const Words c = high_words(z[0], z[2]), e = high_words(z[1], z[3]);
          _mm512_storeu_si512(to, low_words(a, b));
          _mm512_storeu_si512(to + kTileKeys, high_words(a, b));
          _mm512_storeu_si512(to + 2 * kTileKeys, low_words(c, e));
          _mm512_storeu_si512(to + 3 * kTileKeys, high_words(c, e));
        };
        turn(low, out + d * kTileKeys + key);
        turn(high, out + (d + 4) * kTileKeys + key);
      }
  }

  // sums (+)= first * second over `depth`, 16 x 16, in tile Sums. The first factor's rows are `row` bytes apart; of the
  // second, tiles 4 and 5 hold what 64 of the depth multiply.
  template <int Sums, bool Fresh>
  INLINE void add_product(i64 depth, const bf16* first, i64 row, const bf16* second, float* sums) {
    Fresh ? zero_tile<Sums>() : load_tile<Sums>(sums, 64);
    for (i64 k = 0; k < depth; k += 64) {
      if (depth > 64) hold(depth - k, second + k * kBlockRows);
      load_tile<6>(first + k, row);
      add_tiles<Sums, 6, 4>();
      if (k + 32 == depth) break;
      load_tile<7>(first + k + 32, row);
      add_tiles<Sums, 7, 5>();
    }
    store_tile<Sums>(sums, 64);
  }

  INLINE void hold(i64 depth, const bf16* second) {
    load_tile<4>(second, 64);
    if (depth > 32) load_tile<5>(second + 32 * kBlockRows, 64);
  }

  INLINE void scores(i64 dim, const KeysOf<bf16>& keys, const bf16* queries, float* out) {
    constexpr i64 kSumsOf = 16 * kBlockRows;
    const i64 row = 2 * keys.row;
    if (dim <= 64) hold(dim, queries);
    add_product<0, true>(dim, keys.sixteen[0], row, queries, out);
    add_product<1, true>(dim, keys.sixteen[1], row, queries, out + kSumsOf);
    add_product<2, true>(dim, keys.sixteen[2], row, queries, out + 2 * kSumsOf);
    add_product<3, true>(dim, keys.sixteen[3], row, queries, out + 3 * kSumsOf);
  }

  // Two keys' weights of 16 rows as pairs; to nearest, ties upwards.
  INLINE void put(bf16* weights, i64 key, f32x16 first, f32x16 second) {
    const u32x16 low = ((u32x16)first + 0x8000u) >> 16, high = (u32x16)second + 0x8000u;
    const __m512i pairs = _mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)low, (__m512i)high);
    __builtin_memcpy(weights + key * kBlockRows, &pairs, sizeof pairs);
  }

  INLINE void add_values(i64 dim, const bf16* values, const bf16* weights, float* o) {
    constexpr i64 kRow = 2 * kTileKeys, kNext = 16 * kTileKeys, kSumsOf = 16 * kBlockRows;
    hold(kTileKeys, weights);
    i64 d = 0;
    for (; d + 64 <= dim; d += 64, values += 4 * kNext, o += 4 * kSumsOf) {
      add_product<0, false>(kTileKeys, values, kRow, weights, o);
      add_product<1, false>(kTileKeys, values + kNext, kRow, weights, o + kSumsOf);
      add_product<2, false>(kTileKeys, values + 2 * kNext, kRow, weights, o + 2 * kSumsOf);
      add_product<3, false>(kTileKeys, values + 3 * kNext, kRow, weights, o + 3 * kSumsOf);
    }
    for (; d < dim; d += 16, values += kNext, o += kSumsOf) add_product<0, false>(kTileKeys, values, kRow, weights, o);
  }
};
#endif
