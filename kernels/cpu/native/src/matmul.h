// The two products of an attention tile, scores = queries * keys and o += weights * values, and the packing of paged
// keys and values that they need. Two ways: fp32 vectors, and bf16 matrix tiles where there is AMX.

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

// out[c][i] = word c of rows[i], for kTileKeys rows of `columns` 32-bit words, a multiple of 4.
INLINE void transpose(const void* const* rows, i64 columns, std::uint32_t* out) {
  constexpr i64 kAtOnce = sizeof(Words) / 4;
  for (i64 at = 0; at < kTileKeys; at += kAtOnce)
    for (i64 c = 0; c < columns; c += 4) {
      Words z[4];
      for (int i = 0; i < 4; ++i) z[i] = pick_words(rows + at, i, c);
      const Words a = low_words(z[0], z[2]), b = low_words(z[1], z[3]);
      const Words d = high_words(z[0], z[2]), e = high_words(z[1], z[3]);
      const Words turned[4] = {low_words(a, b), high_words(a, b), low_words(d, e), high_words(d, e)};
      for (int i = 0; i < 4; ++i) __builtin_memcpy(out + (c + i) * kTileKeys + at, &turned[i], sizeof turned[i]);
    }
}

// Rows and vectors of 16 columns whose sums fit in the registers together with what they are made from.
#if HAS_AVX512
constexpr int kSumRows = 6, kSumVectors = 4;
#elif HAS_AVX2
constexpr int kSumRows = 3, kSumVectors = 2;
#else
constexpr int kSumRows = 3, kSumVectors = 1;
#endif

// c[rows][columns] (+)= a[rows][depth] * b[depth][columns]; every sum runs over the depth in order.
template <int Rows, int Vectors, bool Add>
INLINE void sums(i64 depth, const float* a, i64 a_row, const float* b, i64 b_row, float* c, i64 c_row) {
  f32x16 sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) sum[i][j] = Add ? load(c + i * c_row + j * kLanes) : f32x16{};
  for (i64 k = 0; k < depth; ++k)
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < Vectors; ++j) sum[i][j] = fma(splat(a[i * a_row + k]), load(b + k * b_row + j * kLanes), sum[i][j]);
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < Vectors; ++j) store(c + i * c_row + j * kLanes, sum[i][j]);
}

template <int Rows, bool Add>
INLINE void row_sums(i64 columns, i64 depth, const float* a, i64 a_row, const float* b, i64 b_row, float* c, i64 c_row) {
  i64 n = 0;
  for (; n + kSumVectors * kLanes <= columns; n += kSumVectors * kLanes)
    sums<Rows, kSumVectors, Add>(depth, a, a_row, b + n, b_row, c + n, c_row);
  for (; n < columns; n += kLanes) sums<Rows, 1, Add>(depth, a, a_row, b + n, b_row, c + n, c_row);
}

template <bool Add>
static void multiply(i64 rows, i64 columns, i64 depth, const float* a, i64 a_row, const float* b, i64 b_row, float* c,
                     i64 c_row) {
  for (i64 m = 0; m < rows;) {
    const i64 blocks = (rows - m + kSumRows - 1) / kSumRows, now = (rows - m + blocks - 1) / blocks;
    const float* some = a + m * a_row;
    float* into = c + m * c_row;
    switch (now) {
      case 1: row_sums<1, Add>(columns, depth, some, a_row, b, b_row, into, c_row); break;
      case 2: row_sums<2, Add>(columns, depth, some, a_row, b, b_row, into, c_row); break;
      case 3: row_sums<3, Add>(columns, depth, some, a_row, b, b_row, into, c_row); break;
#if HAS_AVX512
      case 4: row_sums<4, Add>(columns, depth, some, a_row, b, b_row, into, c_row); break;
      case 5: row_sums<5, Add>(columns, depth, some, a_row, b, b_row, into, c_row); break;
      default: row_sums<6, Add>(columns, depth, some, a_row, b, b_row, into, c_row); break;
#endif
    }
    m += now;
  }
}

// Everything in fp32; keys and values of any dtype.
struct VectorProduct {
  using Operand = float;  // of queries and weights

  template <class T>
  INLINE void pack_keys(const void** rows, i64 dim, float* widened, void* out) {
    if constexpr (sizeof(T) != 4) {
      for (i64 i = 0; i < kTileKeys; ++i) {
        for (i64 d = 0; d < dim; d += kLanes) store(widened + i * dim + d, load((const T*)rows[i] + d));
        rows[i] = widened + i * dim;
      }
    }
    transpose(rows, dim, (std::uint32_t*)out);  // [dim][keys]
  }

  template <class T>
  INLINE void pack_values(const void* const* rows, i64 dim, void* out) {
    for (i64 i = 0; i < kTileKeys; ++i)
      for (i64 d = 0; d < dim; d += kLanes) store((float*)out + i * dim + d, load((const T*)rows[i] + d));
  }

  INLINE void scores(i64 rows, i64 dim, const float* queries, const void* keys, float* out) {
    multiply<false>(rows, kTileKeys, dim, queries, dim, (const float*)keys, kTileKeys, out, kTileKeys);
  }

  INLINE void add_values(i64 rows, i64 dim, const float* weights, const void* values, float* o) {
    multiply<true>(rows, dim, kTileKeys, weights, kTileKeys, (const float*)values, dim, o, dim);
  }
};

#if HAS_AMX
// bf16 tiles of 16 rows x 64 bytes. The second factor lies as pairs of rows: word [k / 2][n] holds rows k and k + 1.
struct TileProduct {
  using Operand = bf16;

  template <class T>
  INLINE void pack_keys(const void** rows, i64 dim, float*, void* out) {
    transpose(rows, dim / 2, (std::uint32_t*)out);  // two neighbours of a key are a word: [dim / 2][keys]
  }

  template <class T>
  INLINE void pack_values(const void* const* rows, i64 dim, void* out) {
    for (i64 i = 0; i < kTileKeys; i += 2)
      for (i64 d = 0; d < dim; d += kLanes) {
        const u32x16 pairs = load_halves((const bf16*)rows[i] + d) | load_halves((const bf16*)rows[i + 1] + d) << 16;
        __builtin_memcpy((std::uint32_t*)out + i / 2 * dim + d, &pairs, sizeof pairs);
      }
  }

  // Tiles 0 to 3 are sums, 4 is of the first factor, 5 and 6 in turn of the second. The compiler does not know that
  // a tile load reads memory: the barrier makes it finish its own stores first.
  template <bool Add>
  INLINE void four_tiles(i64 depth, const bf16* a, i64 a_row, const std::uint32_t* b, i64 b_row, float* c, i64 c_row) {
    __asm__ volatile("" ::: "memory");
    if constexpr (Add) {
      _tile_loadd(0, c, 4 * c_row);
      _tile_loadd(1, c + 16, 4 * c_row);
      _tile_loadd(2, c + 32, 4 * c_row);
      _tile_loadd(3, c + 48, 4 * c_row);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (i64 k = 0; k < depth; k += 32) {
      const std::uint32_t* words = b + k / 2 * b_row;
      _tile_loadd(4, a + k, 2 * a_row);
      _tile_loadd(5, words, 4 * b_row);
      _tile_dpbf16ps(0, 4, 5);
      _tile_loadd(6, words + 16, 4 * b_row);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(5, words + 32, 4 * b_row);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(6, words + 48, 4 * b_row);
      _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, c, 4 * c_row);
    _tile_stored(1, c + 16, 4 * c_row);
    _tile_stored(2, c + 32, 4 * c_row);
    _tile_stored(3, c + 48, 4 * c_row);
  }

  template <bool Add>
  INLINE void one_tile(i64 depth, const bf16* a, i64 a_row, const std::uint32_t* b, i64 b_row, float* c, i64 c_row) {
    __asm__ volatile("" ::: "memory");
    if constexpr (Add)
      _tile_loadd(0, c, 4 * c_row);
    else
      _tile_zero(0);
    for (i64 k = 0; k < depth; k += 32) {
      _tile_loadd(4, a + k, 2 * a_row);
      _tile_loadd(5, b + k / 2 * b_row, 4 * b_row);
      _tile_dpbf16ps(0, 4, 5);
    }
    _tile_stored(0, c, 4 * c_row);
  }

  INLINE void scores(i64, i64 dim, const bf16* queries, const void* keys, float* out) {
    four_tiles<false>(dim, queries, dim, (const std::uint32_t*)keys, kTileKeys, out, kTileKeys);
  }

  INLINE void add_values(i64, i64 dim, const bf16* weights, const void* values, float* o) {
    const std::uint32_t* words = (const std::uint32_t*)values;
    i64 n = 0;
    for (; n + 64 <= dim; n += 64) four_tiles<true>(kTileKeys, weights, kTileKeys, words + n, dim, o + n, dim);
    for (; n < dim; n += 16) one_tile<true>(kTileKeys, weights, kTileKeys, words + n, dim, o + n, dim);
  }

  // Tiles 0 to 4, of sums and of the first factor, have `rows`; the others 16.
  INLINE void enter(i64 rows = kBlockRows) {
    struct alignas(64) {
      std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
      std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    for (int tile = 0; tile < 5; ++tile) config.rows[tile] = (std::uint8_t)rows;
    // GCC 12 takes the structure for unused without this and leaves it empty.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }

  INLINE void leave() { _tile_release(); }
};
#endif
