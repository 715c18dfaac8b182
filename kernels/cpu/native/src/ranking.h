// Which tokens of a row lead, without sorting it.
//
//     logits ─ find_peaks ─▶ the largest of every 64 ─ floor_of ─▶ a floor under all that can be kept
//        └───────────────────── collect ─▶ the list above it ─ leading ─▶ exactly what is kept
//
// Ranked by x = (logit - top) / temperature - shift, at most 0: the larger x first, of equals the lower column.

constexpr i64 kGroup = 64;         // columns with one peak: four vectors, and the words of 16 of Philox's counters
constexpr i64 kPieceGroups = 128;  // what a thread takes at a time: 32 KiB of logits
constexpr i64 kNoColumn = INT64_MAX;

INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Bit j: lane j of a is not below that of b. The compiler's own comparisons of vectors make lanes of them first.
INLINE std::uint32_t bits_from(f32x16 a, f32x16 b) {
#if HAS_AVX512
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif HAS_AVX2
  union Halves {
    f32x16 whole;
    __m256 half[2];
  } x{a}, y{b};
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.half[0], y.half[0], _CMP_GE_OQ));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.half[1], y.half[1], _CMP_GE_OQ));
  return (std::uint32_t)(low | high << 8);
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (std::uint32_t)(a[i] >= b[i]) << i;
  return bits;
#endif
}

// Bit j: lane j of a is above that of b; both are numbers.
INLINE std::uint32_t bits_above(f32x16 a, f32x16 b) { return ~bits_from(b, a) & 0xFFFFu; }

INLINE std::uint32_t first_bits(i64 n) { return n >= kLanes ? 0xFFFFu : n <= 0 ? 0u : (1u << n) - 1u; }

// f(index of each bit)
template <class F>
INLINE void for_bits(std::uint32_t bits, F f) {
  for (; bits; bits &= bits - 1) f((i64)__builtin_ctz(bits));
}

// The lanes of these bits side by side; what lies behind them, up to 16 in all, is overwritten.
INLINE void pack(float* to, f32x16 v, std::uint32_t bits) {
#if HAS_AVX512
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps((__mmask16)bits, (__m512)v));
#else
  for_bits(bits, [&](i64 i) { *to++ = v[i]; });
#endif
}

// 16 values of n from `at` on; behind the last of them -inf.
INLINE f32x16 load_row(const float* p, i64 n, i64 at) {
  if (at + kLanes <= n) return load(p + at);
  float lanes[kLanes];
  for (i64 i = 0; i < kLanes; ++i) lanes[i] = at + i < n ? p[at + i] : -kInfinity;
  return load(lanes);
}

// e^x for x at most 0: what rounding takes from the exponent is put back by the slope.
INLINE f32x16 exp(f32x16 x) {
  x = max(x, splat(-200.0f));  // 0 by then, and never inf - inf
  const f32x16 exponent = x * kLog2E, whole = exp2(exponent);
  constexpr float kRestOfLog2E = 1.92596299e-8f;
  const f32x16 lost = fma(x, splat(kLog2E), -exponent) + x * kRestOfLog2E;
  return fma(whole, lost * kLn2, whole);
}

INLINE void store_row(float* p, i64 n, i64 at, f32x16 v) {
  if (at + kLanes <= n)
    store(p + at, v);
  else
    store_some(p + at, v, n - at);
}

struct Row {
  const float* logits;
  i64 columns;
  const float* peaks;  // of its groups
  float top, temperature, shift;

  i64 groups() const { return ceil_div(columns, kGroup); }
};

// x of a logit, or of 16.
template <class T>
INLINE T scaled(const Row& row, T logit) {
  T x = logit - row.top;
  if (row.temperature != 1) x = x / row.temperature;
  return row.shift == 0 ? x : x - row.shift;
}

// x of 16 columns; behind the last of them -inf.
INLINE f32x16 x_of(const Row& row, i64 column) { return scaled(row, load_row(row.logits, row.columns, column)); }

// The largest of each group from `first` to `last`; NaN where there is one.
static void find_peaks(const float* logits, i64 columns, i64 first, i64 last, float* peaks) {
  for (i64 g = first; g < last; ++g) {
    f32x16 v[4];
    for (i64 i = 0; i < 4; ++i) v[i] = load_row(logits, columns, g * kGroup + i * kLanes);
    const f32x16 largest = max(max(v[0], v[1]), max(v[2], v[3]));
    // A sum is NaN where a part is, or where infinities meet; few groups are looked at again.
    const f32x16 sum = (v[0] + v[1]) + (v[2] + v[3]);
    float peak = max_lanes(largest);
    if (bits_from(sum, sum) != 0xFFFFu)
      for (i64 c = g * kGroup; c < columns && c < (g + 1) * kGroup; ++c)
        if (logits[c] != logits[c]) peak = logits[c];
    peaks[g] = peak;
  }
}

struct Top {
  float value;
  i64 column;
};

// The largest of a row, and the first column that has it; NaN wins over every number.
static Top find_top(const float* logits, i64 columns, const float* peaks) {
  const i64 groups = ceil_div(columns, kGroup);
  i64 best = 0;
  for (i64 g = 0; g < groups; g += kLanes) {
    const f32x16 some = load_row(peaks, groups, g);
    if (bits_from(splat(peaks[best]), some) == 0xFFFFu) continue;
    for (i64 i = g; i < groups && i < g + kLanes; ++i) {
      if (peaks[best] != peaks[best]) break;
      if (!(peaks[best] >= peaks[i])) best = i;
    }
  }
  const float value = peaks[best];
  i64 column = best * kGroup;
  while (logits[column] != value && (value == value || logits[column] == logits[column])) ++column;
  return {value, column};
}

// What a row keeps: columns with x above the floor, and of those with x at the floor the ones up to `last`.
struct Kept {
  float floor;
  i64 last;
};

// Bit j: whether column + j, of this x, is kept.
INLINE std::uint32_t kept_bits(const Kept& kept, f32x16 x, i64 column, i64 columns) {
  const std::uint32_t equals = kept.last == kNoColumn ? 0xFFFFu : first_bits(kept.last - column + 1);
  return (bits_above(x, splat(kept.floor)) | (bits_from(x, splat(kept.floor)) & equals)) & first_bits(columns - column);
}

constexpr Kept kAll = {-kInfinity, kNoColumn};

// f(group) for those of groups `first` to `last` whose peak is not below the floor.
template <class F>
INLINE void for_groups(const Row& row, float floor, i64 first, i64 last, F f) {
  for (i64 g = first; g < last; g += kLanes) {
    const f32x16 peaks = scaled(row, load_row(row.peaks, last, g));
    for_bits(bits_from(peaks, splat(floor)) & first_bits(last - g), [&](i64 i) { f(g + i); });
  }
}

// The sum of e^x over groups, in double every 256 columns.
static double mass_of(const Row& row, i64 first, i64 last) {
  double sum = 0;
  for (i64 c = first * kGroup; c < last * kGroup && c < row.columns; c += 4 * kGroup) {
    f32x16 some{};
    for (i64 i = c; i < c + 4 * kGroup && i < last * kGroup && i < row.columns; i += kLanes) some += exp(x_of(row, i));
    sum += sum_lanes(some);
  }
  return sum;
}

// Some columns of a row in their order, and room to work on them.
struct List {
  float *x, *amounts, *left;
  std::int32_t* columns;
  i64 size;

  static i64 bytes(i64 columns) { return 4 * 4 * room(columns); }
  static i64 room(i64 columns) { return (columns + 2 * kLanes - 1) / kLanes * kLanes; }

  static List in(char* memory, i64 columns) {
    float* const p = (float*)memory;
    const i64 n = room(columns);
    return {p, p + n, p + 2 * n, (std::int32_t*)(p + 3 * n), 0};
  }
};

INLINE void append(List& list, f32x16 x, i64 column, std::uint32_t bits) {
  constexpr i32x16 kLane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  pack(list.x + list.size, x, bits);
  pack((float*)list.columns + list.size, (f32x16)(kLane + (std::int32_t)column), bits);
  list.size += __builtin_popcount(bits);
}

static void collect(const Row& row, Kept kept, List& list) {
  list.size = 0;
  for_groups(row, kept.floor, 0, row.groups(), [&](i64 group) {
    for (i64 c = group * kGroup; c < (group + 1) * kGroup && c < row.columns; c += kLanes) {
      const f32x16 x = x_of(row, c);
      if (const std::uint32_t bits = kept_bits(kept, x, c, row.columns)) append(list, x, c, bits);
    }
  });
}

// How much each x counts: 1, or its mass e^x. Returns the sum.
static double weigh(const float* x, float* amounts, i64 n, bool by_mass) {
  if (!by_mass) {
    for (i64 i = 0; i < n; ++i) amounts[i] = 1.0f;
    return (double)n;
  }
  double sum = 0;
  for (i64 i = 0; i < n; i += kLanes) {
    const f32x16 mass = exp(load_row(x, n, i));
    store_row(amounts, n, i, mass);
    sum += sum_lanes(mass);
  }
  return sum;
}

struct Threshold {
  float floor;
  i64 equals;  // so many of those at the floor are within
};

// Round 0: eighths of -x, which spread what a softmax leaves; rounds 1 to 4: the bytes of -x, the highest first.
INLINE i32x16 digits_of(f32x16 x, int round) {
  if (round == 0) return __builtin_convertvector(min(x * -8.0f, splat(255.0f)), i32x16);
  return ((i32x16)x & 0x7FFFFFFF) >> (32 - 8 * round) & 255;
}

INLINE std::uint32_t equal_digits(i32x16 digits, std::int32_t digit) {
#if HAS_AVX512
  return _mm512_cmpeq_epi32_mask((__m512i)digits, _mm512_set1_epi32(digit));
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (std::uint32_t)(digits[i] == digit) << i;
  return bits;
#endif
}

// The smallest beginning of the ranking of x whose amounts reach the target. Overwrites both arrays.
//
// A radix selection: each round keeps the numbers of the digit in which the target is reached. Four tables in turn, so
// that one number's sum does not wait for its neighbour's.
static Threshold cut(float* x, float* amounts, i64 n, double target) {
  constexpr int kDigits = 256, kTables = 4;
  double before = 0;
  for (int round = 0; round < 5; ++round) {
    double sums[kTables][kDigits] = {};
    for (i64 i = 0; i < n; i += kLanes) {
      std::int32_t digits[kLanes];
      const i32x16 some = digits_of(load_row(x, n, i), round);
      __builtin_memcpy(digits, &some, sizeof digits);
      for (i64 j = 0; j < kLanes && i + j < n; ++j) sums[j % kTables][digits[j]] += amounts[i + j];
    }
    int chosen = 0;
    double passed = 0;  // before the digit that was chosen
    double reached = 0;
    for (int d = 0; d < kDigits; ++d) {
      const double sum = (sums[0][d] + sums[1][d]) + (sums[2][d] + sums[3][d]);
      if (sum == 0) continue;
      chosen = d;
      passed = reached;
      reached += sum;
      if (before + reached >= target) break;
    }
    before += passed;
    i64 same = 0;
    for (i64 i = 0; i < n; i += kLanes) {
      const f32x16 some = load_row(x, n, i), theirs = load_row(amounts, n, i);
      const std::uint32_t bits = equal_digits(digits_of(some, round), chosen) & first_bits(n - i);
      pack(x + same, some, bits);
      pack(amounts + same, theirs, bits);
      same += __builtin_popcount(bits);
    }
    n = same;
  }
  i64 equals = 1;
  while (equals < n && before + (double)equals * amounts[0] < target) ++equals;
  return {x[0], equals};
}

// A floor under the leading columns that reach the target: where the peaks alone reach it, the last that they need.
static float floor_of(const Row& row, bool by_mass, double target, List& list) {
  const i64 n = row.groups();
  if (!by_mass && (double)n < target) return -kInfinity;
  for_lanes(n, [&](auto at, auto put) { put(list.left, scaled(row, at(row.peaks))); });
  return weigh(list.left, list.amounts, n, by_mass) >= target ? cut(list.left, list.amounts, n, target).floor
                                                              : -kInfinity;
}

// The smallest beginning of the list's ranking whose amounts reach the target. weigh() has filled the amounts.
static Kept leading(List& list, double target) {
  __builtin_memcpy(list.left, list.x, list.size * sizeof(float));
  const Threshold found = cut(list.left, list.amounts, list.size, target);
  i64 seen = 0, i = 0;
  for (;; ++i)
    if (list.x[i] == found.floor && ++seen == found.equals) return {found.floor, list.columns[i]};
}
