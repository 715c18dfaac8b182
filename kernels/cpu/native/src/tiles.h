// Products of bf16 matrix tiles (AMX): 16 rows or outputs by 32 inputs, 1 KiB each, summed in fp32.
//
// The first factor has a line of 32 inputs per row, the second a line of 16 outputs per pair of inputs. Tiles 0 to 3 are
// sums, 4 and 5 of the first factor, 6 and 7 of the second: two by two tiles take four loads for four products, which
// is what the loads can follow.

#if HAS_AMX

constexpr i64 kTileInputs = 32, kTileOutputs = 16, kTileBytes = 1024, kLine = 64;

// Sums and first factors of `rows` rows.
INLINE void enter_tiles(i64 rows) {
  struct alignas(64) {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  for (int tile = 0; tile < 6; ++tile) config.rows[tile] = (std::uint8_t)rows;
  // GCC 12 takes the structure for unused without this and leaves it empty.
  __asm__ volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

INLINE void leave_tiles() { _tile_release(); }

// Lines that will be needed soon, some with each step of a product: in one go they would take every buffer for misses,
// and the loads of the product wait behind them.
struct Ahead {
  const char* at;
  i64 apart, count;  // `count` lines from `at` and as many from `at + apart`, with each step

  INLINE void step(Ahead& a) {
    for (i64 i = 0; i < a.count; ++i, a.at += kLine) {
      _mm_prefetch(a.at, _MM_HINT_T1);
      _mm_prefetch(a.at + a.apart, _MM_HINT_T1);
    }
  }
};

// sums (+)= x * weights over `steps` tiles of inputs, for Rows x Outputs tiles. Tiles of x follow each other over the
// inputs, those of the next 16 rows lie x_next bytes behind; weights likewise. sums: [Rows][Outputs][16][16].
template <int Rows, int Outputs>
INLINE void add_products(const char* x, i64 x_tile, i64 x_next, const char* w, i64 w_next, i64 steps, bool first,
                         float* sums, Ahead& ahead) {
  __asm__ volatile("" ::: "memory");  // the compiler does not know that a tile load reads memory
  if (first) {
    _tile_zero(0);
    if constexpr (Outputs > 1) _tile_zero(1);
    if constexpr (Rows > 1) _tile_zero(2);
    if constexpr (Rows > 1 && Outputs > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kLine);
    if constexpr (Outputs > 1) _tile_loadd(1, sums + 256, kLine);
    if constexpr (Rows > 1) _tile_loadd(2, sums + 256 * Outputs, kLine);
    if constexpr (Rows > 1 && Outputs > 1) _tile_loadd(3, sums + 768, kLine);
  }
  for (i64 i = 0; i < steps; ++i, x += x_tile, w += kTileBytes) {
    Ahead::step(ahead);
    _tile_loadd(4, x, kLine);
    _tile_loadd(6, w, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Outputs > 1) {
      _tile_loadd(7, w + w_next, kLine);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows > 1) {
      _tile_loadd(5, x + x_next, kLine);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Outputs > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kLine);
  if constexpr (Outputs > 1) _tile_stored(1, sums + 256, kLine);
  if constexpr (Rows > 1) _tile_stored(2, sums + 256 * Outputs, kLine);
  if constexpr (Rows > 1 && Outputs > 1) _tile_stored(3, sums + 768, kLine);
  __asm__ volatile("" ::: "memory");
}

// A tile of signed bytes as bf16, exactly.
INLINE void widen(const std::int8_t* codes, char* tile) {
  for (i64 line = 0; line < 16; ++line, codes += 32, tile += kLine) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(codes + 16))));
    _mm512_storeu_si512(tile, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// A tile of codes 0 to 15 as bf16. A look-up takes five bits of a word; the table says the same for both values of
// the fifth, so that codes need no mask.
INLINE void widen_nibbles(const char* words, char* tile) {
  alignas(64) static constexpr std::uint16_t kCodes[32] = {
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
      0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
      0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
  const __m512i codes = _mm512_load_si512(kCodes);
  for (i64 line = 0; line < 4; ++line, words += kLine, tile += 4 * kLine) {
    const __m512i word = _mm512_loadu_si512(words);
    _mm512_storeu_si512(tile, _mm512_permutexvar_epi16(word, codes));
    _mm512_storeu_si512(tile + kLine, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4), codes));
    _mm512_storeu_si512(tile + 2 * kLine, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 8), codes));
    _mm512_storeu_si512(tile + 3 * kLine, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 12), codes));
  }
}

#endif
