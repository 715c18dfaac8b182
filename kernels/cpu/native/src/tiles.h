// Products of bf16 matrix tiles (AMX): 16 rows or outputs by 32 inputs, 1 KiB each, summed in fp32.
//
// The first factor has a line of 32 inputs per row, the second a line of 16 outputs per pair of inputs. Tiles 0 to 3
// are sums, 4 and 5 of the first factor, 6 and 7 of the second: two by two tiles take four loads for four products,
// which is what the loads can follow.

#if HAS_AMX

constexpr i64 kTileInputs = 32, kTileOutputs = 16, kTileBytes = 1024, kTileFloats = 256, kLine = 64;

// Tiles 0 to 5, of sums and of first factors, have `rows` rows; the others 16.
INLINE void enter_tiles(i64 rows = kBlockRows) {
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

// Weights that will be needed soon, from memory into L2: `bytes` at `at` and as many at `at + apart`, some lines with
// each step of a product. In one go they would take every buffer for misses, and the loads of the product wait behind
// them.
//
// Such a prefetch keeps one of the 16 buffers for misses of L1 until its line is there, 300 ns under load. With few
// rows, where memory is what a product waits for, the processor's own prefetch into L2 is to do most of it: lines are
// asked for in all pages in turn, so that it has time to run ahead in each. On two Sapphire Rapids cores and a model of
// 0.5 G weights this takes 14 % off the products of 64 and of 96 rows and 4 % off those of 128, but adds 4 % with 256.
struct Ahead {
  static constexpr i64 kPage = 4096, kPair = 2 * kLine;
  const char* at = nullptr;
  i64 apart = 0, bytes = 0;
  i64 part = 0;  // bytes between lines asked for in turn: a page, or all, which is one line after the other
  i64 each = 0;  // pairs of lines per step
  i64 begin = 0, line = 0;

  Ahead() = default;
  __attribute__((always_inline)) Ahead(const char* at, i64 apart, i64 bytes, bool in_turn, i64 steps)
      : at(at), apart(apart), bytes(bytes), part(in_turn ? kPage : bytes) {
    const i64 pairs = bytes ? (bytes + part - 1) / part * ((part + kPair - 1) / kPair) : 0;
    each = (pairs + steps - 1) / steps;
  }

  __attribute__((always_inline)) void step() {
    for (i64 i = 0; i < each && line < part; ++i) {
      const char* const soon = at + begin + line;
      _mm_prefetch(soon, _MM_HINT_T1);
      _mm_prefetch(soon + kLine, _MM_HINT_T1);
      _mm_prefetch(soon + apart, _MM_HINT_T1);
      _mm_prefetch(soon + apart + kLine, _MM_HINT_T1);
      begin += part;
      if (begin >= bytes) {
        begin = 0;
        line += kPair;
      }
    }
  }
};

// sums (+)= x * weights over `steps` tiles of inputs, for Rows x Outputs tiles. The lines of a tile of x are x_line
// bytes apart, its tiles over the inputs x_tile, those of the next block of rows x_next; weights lie as tiles, those of
// the next outputs w_next bytes behind. sums: [Rows][Outputs][16][16]. x passes by L1 (a hint of its loads), so that
// the weights stay there: measured on a Sapphire Rapids core with x in L2, this makes 2.0 TFLOP/s of 1.5; the tiles
// allow 2.7.
template <int Rows, int Outputs>
INLINE void add_products(const char* x, i64 x_line, i64 x_tile, i64 x_next, const char* w, i64 w_next, i64 steps,
                         bool first, float* sums, Ahead& ahead) {
  __asm__ volatile("" ::: "memory");  // the compiler does not know that a tile load reads memory
  if (first) {
    _tile_zero(0);
    if constexpr (Outputs > 1) _tile_zero(1);
    if constexpr (Rows > 1) _tile_zero(2);
    if constexpr (Rows > 1 && Outputs > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kLine);
    if constexpr (Outputs > 1) _tile_loadd(1, sums + kTileFloats, kLine);
    if constexpr (Rows > 1) _tile_loadd(2, sums + kTileFloats * Outputs, kLine);
    if constexpr (Rows > 1 && Outputs > 1) _tile_loadd(3, sums + 3 * kTileFloats, kLine);
  }
  for (i64 i = 0; i < steps; ++i, x += x_tile, w += kTileBytes) {
    ahead.step();
    _tile_stream_loadd(4, x, x_line);
    _tile_loadd(6, w, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Outputs > 1) {
      _tile_loadd(7, w + w_next, kLine);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Rows > 1) {
      _tile_stream_loadd(5, x + x_next, x_line);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Outputs > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kLine);
  if constexpr (Outputs > 1) _tile_stored(1, sums + kTileFloats, kLine);
  if constexpr (Rows > 1) _tile_stored(2, sums + kTileFloats * Outputs, kLine);
  if constexpr (Rows > 1 && Outputs > 1) _tile_stored(3, sums + 3 * kTileFloats, kLine);
  __asm__ volatile("" ::: "memory");
}

// bf16 of 0 to 127, by byte: what a code's magnitude looks up.
struct Magnitudes {
  alignas(kLine) std::uint8_t low[128], high[128];
};

constexpr Magnitudes kMagnitudes = [] {
  Magnitudes m{};
  for (int i = 1; i < 128; ++i) {
    int exponent = 0;
    while (i >> (exponent + 1)) ++exponent;
    const int bits = (127 + exponent) << 7 | (i << (7 - exponent) & 127);
    m.low[i] = (std::uint8_t)bits;
    m.high[i] = (std::uint8_t)(bits >> 8);
  }
  return m;
}();

// A tile of signed bytes as bf16, exactly. By look-ups, in half the time of conversions to fp32 and back. -128 has no
// positive counterpart: its magnitude reads as 0 in the low byte, which is right, and the high one is put in its place.
INLINE void widen(const char* codes, char* tile) {
  const __m512i low[2] = {_mm512_load_si512(kMagnitudes.low), _mm512_load_si512(kMagnitudes.low + 64)};
  const __m512i high[2] = {_mm512_load_si512(kMagnitudes.high), _mm512_load_si512(kMagnitudes.high + 64)};
  const __m512i sign = _mm512_set1_epi8((char)0x80), largest = _mm512_set1_epi8((char)0xc3);
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // undone by the unpacking, which is by quarters
  for (i64 line = 0; line < 16; line += 2, codes += kLine, tile += 2 * kLine) {
    const __m512i code = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(codes)), size = _mm512_abs_epi8(code);
    const __m512i low_byte = _mm512_permutex2var_epi8(low[0], size, low[1]);
    const __m512i unsigned_byte = _mm512_permutex2var_epi8(high[0], size, high[1]);
    const __m512i signed_byte = _mm512_ternarylogic_epi32(unsigned_byte, code, sign, 0xf8);  // unsigned | code & sign
    const __m512i high_byte = _mm512_mask_mov_epi8(signed_byte, _mm512_movepi8_mask(size), largest);
    _mm512_storeu_si512(tile, _mm512_unpacklo_epi8(low_byte, high_byte));
    _mm512_storeu_si512(tile + kLine, _mm512_unpackhi_epi8(low_byte, high_byte));
  }
}

// A tile of codes 0 to 15 as bf16. A look-up takes five bits of a word; the table says the same for both values of
// the fifth, so that codes need no mask. Shifts compete with a part of the look-up for a port: two of three are made by
// choosing bytes, on another one.
INLINE void widen_nibbles(const char* words, char* tile) {
  alignas(64) static constexpr std::uint16_t kCodes[32] = {
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
      0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
      0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
  const __m512i codes = _mm512_load_si512(kCodes);
  const __m512i third = _mm512_set1_epi64(0x3838282818180808), fourth = _mm512_set1_epi64(0x3c3c2c2c1c1c0c0c);  // bits
  for (i64 line = 0; line < 4; ++line, words += kLine, tile += 4 * kLine) {
    const __m512i word = _mm512_loadu_si512(words);
    _mm512_storeu_si512(tile, _mm512_permutexvar_epi16(word, codes));
    _mm512_storeu_si512(tile + kLine, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4), codes));
    _mm512_storeu_si512(tile + 2 * kLine, _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(third, word), codes));
    _mm512_storeu_si512(tile + 3 * kLine, _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(fourth, word), codes));
  }
}

// A tile as it is stored to bf16.
template <WeightKind Kind>
INLINE void widen_tile(const char* stored, char* tile) {
  if constexpr (Kind == kInt8)
    widen(stored, tile);
  else
    widen_nibbles(stored, tile);
}

template <WeightKind Kind>
constexpr i64 kStoredBytes = Kind == kFloats ? kTileBytes
                             : Kind == kInt8 ? kTileBytes / 2
                                             : kTileBytes / 4;

#endif
