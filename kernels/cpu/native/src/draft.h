// The first children that are drawn from each row's distribution, without replacement: the largest of log(q) + noise.

struct DrawChildren {
  i64 rows;
  const float* q;  // [rows, columns]
  i64 columns, count;
  const i64 *seeds, *sample_index, *positions, *nodes;  // [rows]
  i64* tokens;                                          // [rows, count]
  float* keys;                                          // [rows, count]
};

// The largest so far, largest first; of equals the lower column.
struct Leaders {
  i64 count;
  i64* tokens;
  float* keys;

  void clear() const {
    for (i64 i = 0; i < count; ++i) {
      tokens[i] = 0;
      keys[i] = -kInfinity;
    }
  }
  float least() const { return keys[count - 1]; }
  // Columns come in their order.
  void take(float key, i64 column) const {
    if (!(key > least())) return;
    i64 i = count - 1;
    for (; i > 0 && key > keys[i - 1]; --i) {
      keys[i] = keys[i - 1];
      tokens[i] = tokens[i - 1];
    }
    keys[i] = key;
    tokens[i] = column;
  }
};

// The values at `column` and on of a row that begins at column 0 and has n; outside of it -inf.
INLINE f32x16 load_inside(const float* p, i64 n, i64 column) {
  if (column >= 0) return load_row(p, n, column);
  float lanes[kLanes];
  for (i64 i = 0; i < kLanes; ++i) lanes[i] = column + i >= 0 && column + i < n ? p[column + i] : -kInfinity;
  return load(lanes);
}

// A node's noise begins in the middle of a group if its stretch of columns does.
static void draw_row(const float* q, i64 columns, i64 stretch, const Source& source, const Leaders& best) {
  const f32x16 least = splat(0x1p-149f);
  best.clear();
  for (i64 group = stretch / kGroup; group * kGroup < stretch + columns; ++group) {
    f32x16 x[4], bound[4];
    std::uint32_t open[4], any = 0;
    for (i64 i = 0; i < 4; ++i) {
      x[i] = load_inside(q, columns, group * kGroup + i * kLanes - stretch);
      bound[i] = log_bound(x[i]);
      open[i] = bits_from(x[i], least) & bits_from(bound[i], splat(best.least() - kMostNoise));
      any |= open[i];
    }
    if (!any) continue;
    u32x16 words[4];
    words_of(source, group, words);
    for (i64 i = 0; i < 4; ++i) {
      const f32x16 u = uniform(words[i]);
      for_bits(open[i] & bits_from(bound[i] + noise_bound(u), splat(best.least())), [&](i64 j) {
        best.take((float)__builtin_log((double)x[i][j]) + gumbel(u[j]), group * kGroup + i * kLanes + j - stretch);
      });
    }
  }
}

static i64 draw_children(const DrawChildren& a, Worker& w) {
  constexpr std::uint32_t kDraft = 1;  // Purpose.DRAFT
  for (Worker::Range r; w.next(r, a.rows, 1);) {
    const i64 row = r.first;
    const Source source = source_of(a.seeds[row], a.sample_index[row], a.positions[row], kDraft);
    const Leaders best = {a.count, a.tokens + row * a.count, a.keys + row * a.count};
    draw_row(a.q + row * a.columns, a.columns, a.nodes[row] * a.columns, source, best);
  }
  return kDone;
}
