// The products of integers.h by vectors, for levels without integer tiles: a quad of a row's inputs, repeated over the
// lanes, with the same quad of 16 outputs.

struct Dots {
#if HAS_VNNI  // four products of an unsigned byte and a signed one, added to a word: codes of x come with 128 added
  struct Weights {
    __m512i all;
  };
  typedef __m512i Quad;
  struct Sums {
    __m512i all;
  };

  INLINE Weights weights(const i8* w) { return {_mm512_loadu_si512(w)}; }
  INLINE Quad quad(std::int32_t x) { return _mm512_set1_epi32(x); }
  INLINE void add(Sums& s, Quad x, const Weights& w) { s.all = _mm512_dpbusd_epi32(s.all, x, w.all); }
  INLINE i32x16 total(const Sums& s) { return (i32x16)s.all; }
#elif HAS_AVX512  // 16-bit factors, of which two neighbours' products become a word: two words to an output
  struct Weights {
    __m512i half[2];
  };
  typedef __m512i Quad;
  struct Sums {
    __m512i half[2];
  };

  INLINE Weights weights(const i8* w) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w)),
            _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + 32)))};
  }
  INLINE Quad quad(std::int32_t x) { return _mm512_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(x))); }
  INLINE void add(Sums& s, Quad x, const Weights& w) {
    for (int i = 0; i < 2; ++i) s.half[i] = _mm512_add_epi32(s.half[i], _mm512_madd_epi16(x, w.half[i]));
  }
  INLINE i32x16 total(const Sums& s) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return (i32x16)_mm512_permutex2var_epi32(s.half[0], even, s.half[1]) +
           (i32x16)_mm512_permutex2var_epi32(s.half[0], odd, s.half[1]);
  }
#elif HAS_AVX2
  struct Weights {
    __m256i quarter[4];
  };
  typedef __m256i Quad;
  struct Sums {
    __m256i quarter[4];
  };

  INLINE Weights weights(const i8* w) {
    Weights all;
    for (int i = 0; i < 4; ++i) all.quarter[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w + i));
    return all;
  }
  INLINE Quad quad(std::int32_t x) { return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(x))); }
  INLINE void add(Sums& s, Quad x, const Weights& w) {
    for (int i = 0; i < 4; ++i) s.quarter[i] = _mm256_add_epi32(s.quarter[i], _mm256_madd_epi16(x, w.quarter[i]));
  }
  INLINE i32x16 total(const Sums& s) {
    union {
      __m256i half[2];
      i32x16 whole;
    } sum;
    for (int i = 0; i < 2; ++i)
      sum.half[i] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(s.quarter[2 * i], s.quarter[2 * i + 1]), 0xd8);
    return sum.whole;
  }
#else
  struct Weights {
    i32x16 byte[4];  // the first inputs of the quads, the second, ...
  };
  typedef std::int32_t Quad;
  struct Sums {
    i32x16 all;
  };

  INLINE Weights weights(const i8* w) {
    u32x16 quads;
    __builtin_memcpy(&quads, w, sizeof quads);
    Weights all;
    for (int i = 0; i < 4; ++i) all.byte[i] = (i32x16)(quads << (24 - 8 * i)) >> 24;
    return all;
  }
  INLINE Quad quad(std::int32_t x) { return x; }
  INLINE void add(Sums& s, Quad x, const Weights& w) {
    for (int i = 0; i < 4; ++i) s.all += (i8)((std::uint32_t)x >> (8 * i)) * w.byte[i];
  }
  INLINE i32x16 total(const Sums& s) { return s.all; }
#endif
};

// Rows whose sums by two tiles of outputs fit in the registers.
#if HAS_VNNI
constexpr int kDotRows = 8;
#elif HAS_AVX512
constexpr int kDotRows = 4;
#else
constexpr int kDotRows = 1;
#endif

template <int Rows, int Columns>
static void dots(const IntegerLinear& l, const Codes& x, i64 row, i64 tile) {
  const i64 column = x.steps * kStepBytes;
  const i8* w = l.weight + tile * column;
  Dots::Sums sums[Rows][Columns] = {};
  for (i64 s = 0; s < x.steps; ++s)
    for (i64 q = 0; q < kStepInputs; q += 4, w += 4 * kLanes) {
      Dots::Weights weights[Columns];
      for (int c = 0; c < Columns; ++c) {
        weights[c] = Dots::weights(w + c * column);
        __builtin_prefetch(w + c * column + 4096);  // 4 KiB ahead: the processor does not look beyond a page
      }
      for (int r = 0; r < Rows; ++r) {
        std::int32_t codes;
        __builtin_memcpy(&codes, x.row(row + r) + s * x.step() + q, sizeof codes);
        const Dots::Quad quad = Dots::quad(codes);
        for (int c = 0; c < Columns; ++c) Dots::add(sums[r][c], quad, weights[c]);
      }
    }
  with_dtype(l.out_dtype, [&](auto t) {
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Columns; ++c) {
        const i64 output = (tile + c) * kLanes;
        i32x16 total = Dots::total(sums[r][c]);
        if (kCodesOffset) total -= load_words(l.sums + output) * kCodesOffset;
        finish<decltype(t)>(l, x, row + r, output, total);
      }
  });
}

template <int Columns>
static void dot_rows(const IntegerLinear& l, const Codes& x, i64 tile) {
  for (i64 row = 0; row < l.rows;) {
    const i64 left = l.rows - row;
    if (left >= kDotRows) {
      dots<kDotRows, Columns>(l, x, row, tile);
      row += kDotRows;
    } else if (left >= 4 && kDotRows > 4) {
      dots<4, Columns>(l, x, row, tile);
      row += 4;
    } else if (left >= 2 && kDotRows > 2) {
      dots<2, Columns>(l, x, row, tile);
      row += 2;
    } else {
      dots<1, Columns>(l, x, row, tile);
      row += 1;
    }
  }
}

static i64 integer_dots(const IntegerLinear& l, Worker& w) {
  char* memory = (char*)l.workspace;
  if (l.rows * l.inputs <= kAlone) {
    memory = w.scratch(Codes(l, nullptr).bytes());
    if (!memory) return kOutOfMemory;
  }
  const Codes x(l, memory);
  if (memory == l.workspace) {
    for (Worker::Range r; w.next(r, l.rows, 1);) make_codes(l, x, r.first, r.last);
    w.barrier();
  } else {
    make_codes(l, x, 0, l.rows);
  }
  const i64 tiles = (l.outputs + kLanes - 1) / kLanes, units = (tiles + 1) / 2;
  for (Worker::Range r; w.next(r, units, 1, 1);) {
    const i64 tile = 2 * in_stretches(r.first, units, w.count);
    if (tile + 1 < tiles)
      dot_rows<2>(l, x, tile);
    else
      dot_rows<1>(l, x, tile);
  }
  return kDone;
}
