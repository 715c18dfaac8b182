// From a row of logits to a token: its largest, or a draw from what temperature and filters leave of it.
//
//     peaks of all pieces ─▶ mass of the pieces ─▶ plan of each row ─▶ the race in pieces ─▶ the best of them
//
// A row is cut into the same pieces whoever computes them, and their results are put together in their order.

struct Greedy {
  i64 rows;
  const float* logits;  // [rows, columns] with this row stride
  i64 columns, row_stride;
  float* values;  // [rows]
  i64* ids;       // [rows]
};

struct Filters {  // of rows of logits; see kernels/reference/sampling.py
  i64 rows;
  const float* logits;  // [rows, columns] with this row stride
  i64 columns, row_stride;
  const float* temperature;
  const i64* top_k;
  const float *top_p, *min_p;
};

struct Sample {
  Filters of;
  const i64 *seeds, *sample_index, *positions;
  i64* ids;  // [rows]
};

struct Probabilities {
  Filters of;
  float* out;  // [rows, columns]
};

struct Draw {
  float value;
  i64 column;

  void take(Draw other) {
    if (other.value > value || (other.value == value && other.column < column)) *this = other;
  }
};

struct Plan {
  Row row;
  Top top;
  Kept kept;
  bool drawn;  // or the largest is taken
};

// Memory that all threads of a kernel share: thread 0's scratch. False if there is none.
static char* common;
static bool share(Worker& w, i64 bytes) {
  if (w.index == 0) common = w.scratch(bytes);
  w.barrier();
  return common != nullptr;
}

// What the threads know of each row, and how rows are cut into pieces.
struct Survey {
  i64 columns, groups, pieces, stride;  // stride: bytes per row
  char* memory;

  explicit Survey(i64 columns)
      : columns(columns), groups(ceil_div(columns, kGroup)), pieces(ceil_div(groups, kPieceGroups)) {
    stride = (groups_bytes() + pieces * (i64)(sizeof(double) + sizeof(Draw)) + (i64)sizeof(Plan) + 63) / 64 * 64;
  }
  i64 groups_bytes() const { return ceil_div(groups, kLanes) * kLanes * (i64)sizeof(float); }
  float* peaks(i64 row) const { return (float*)(memory + row * stride); }
  double* masses(i64 row) const { return (double*)((char*)peaks(row) + groups_bytes()); }
  Draw* draws(i64 row) const { return (Draw*)(masses(row) + pieces); }
  Plan& plan(i64 row) const { return *(Plan*)(draws(row) + pieces); }
  // The groups of piece i.
  Worker::Range groups_of(i64 i) const {
    const i64 first = i * kPieceGroups, last = first + kPieceGroups;
    return {first, last < groups ? last : groups};
  }
};

// f(row, piece) for all pieces of all rows.
template <class F>
INLINE void for_pieces(const Survey& s, i64 rows, Worker& w, i64 phase, F f) {
  for (Worker::Range r; w.next(r, rows * s.pieces, 1, phase);) f(r.first / s.pieces, r.first % s.pieces);
}

// The peaks of all rows; everybody has them behind it.
static void find_all_peaks(const Survey& s, const float* logits, i64 row_stride, i64 rows, Worker& w) {
  for_pieces(s, rows, w, 0, [&](i64 row, i64 piece) {
    const Worker::Range groups = s.groups_of(piece);
    find_peaks(logits + row * row_stride, s.columns, groups.first, groups.last, s.peaks(row));
  });
  w.barrier();
}

static i64 greedy(const Greedy& g, Worker& w) {
  Survey s(g.columns);
  if (!share(w, g.rows * s.stride)) return kOutOfMemory;
  s.memory = common;
  find_all_peaks(s, g.logits, g.row_stride, g.rows, w);
  for (i64 row = w.index; row < g.rows; row += w.count) {
    const Top top = find_top(g.logits + row * g.row_stride, g.columns, s.peaks(row));
    g.values[row] = top.value;
    g.ids[row] = top.column;
  }
  return kDone;
}

INLINE bool finite(float x) { return x - x == 0; }

// The row as the filters see it. A row whose largest logit is not finite has no distribution.
static void look(const Filters& f, const Survey& s, i64 index, Plan& p) {
  const float* const logits = f.logits + index * f.row_stride;
  p.top = find_top(logits, f.columns, s.peaks(index));
  p.drawn = f.temperature[index] > 0 && finite(p.top.value);
  p.row = {logits, f.columns, s.peaks(index), p.top.value, f.temperature[index], 0};
  p.kept = kAll;
}

static void filter(const Filters& f, const Survey& s, i64 index, Plan& p, List& list) {
  const i64 top_k = f.top_k[index];
  const float top_p = f.top_p[index] < 0 ? 0 : f.top_p[index], min_p = f.min_p[index];
  const bool ranked = top_k > 0 && top_k < f.columns;
  if (ranked) {
    collect(p.row, {floor_of(p.row, false, (double)top_k, list), kNoColumn}, list);
    weigh(list.x, list.amounts, list.size, false);
    p.kept = leading(list, (double)top_k);
  }
  if (top_p < 1) {
    double mass = 0;
    if (!ranked) {
      for (i64 i = 0; i < s.pieces; ++i) mass += s.masses(index)[i];
      // All columns below the second of these floors together weigh less than what is left out.
      const float floors[] = {floor_of(p.row, true, top_p * mass, list),
                              (float)__builtin_log((1 - top_p) * mass / (double)f.columns) - 1e-3f};
      collect(p.row, {floors[0] > floors[1] ? floors[0] : floors[1], kNoColumn}, list);
      weigh(list.x, list.amounts, list.size, true);
    } else {
      collect(p.row, p.kept, list);
      mass = weigh(list.x, list.amounts, list.size, true);
    }
    p.kept = leading(list, top_p * mass);
  }
  if (min_p > 0) {
    const float floor = (float)__builtin_log((double)min_p);
    if (floor > 0)
      p.kept = {0, p.top.column};
    else if (floor > p.kept.floor)
      p.kept = {floor, kNoColumn};
  }
}

// Plans of all rows, behind three phases; everybody has them behind it.
static void make_plans(const Filters& f, const Survey& s, char* lists, Worker& w) {
  find_all_peaks(s, f.logits, f.row_stride, f.rows, w);
  for_pieces(s, f.rows, w, 1, [&](i64 index, i64 piece) {
    const bool ranked = f.top_k[index] > 0 && f.top_k[index] < f.columns;
    if (ranked || !(f.top_p[index] < 1)) return;
    Plan p;
    look(f, s, index, p);
    const Worker::Range groups = s.groups_of(piece);
    if (p.drawn) s.masses(index)[piece] = mass_of(p.row, groups.first, groups.last);
  });
  w.barrier();
  for (Worker::Range r; w.next(r, f.rows, 1, 2);) {
    Plan& p = s.plan(r.first);
    List list = List::in(lists + w.index * List::bytes(f.columns), f.columns);
    look(f, s, r.first, p);
    if (p.drawn) filter(f, s, r.first, p, list);
  }
  w.barrier();
}

// Memory for the survey of all rows and a list for each thread.
static char* survey(const Filters& f, Survey& s, Worker& w) {
  const i64 bytes = f.rows * s.stride;
  if (!share(w, bytes + w.count * List::bytes(f.columns))) return nullptr;
  s.memory = common;
  return common + bytes;
}

// The race x + noise within one group. What cannot win by any noise gets none, and what cannot win by a bound on its
// noise is spared the logarithms.
static void race(const Plan& p, const Source& source, i64 group, Draw& best) {
  const i64 columns = p.row.columns, first = group * kGroup;
  f32x16 x[4];
  std::uint32_t open[4], any = 0;
  for (i64 i = 0; i < 4; ++i) {
    const i64 column = first + i * kLanes;
    x[i] = x_of(p.row, column);
    open[i] = kept_bits(p.kept, x[i], column, columns) & bits_from(x[i], splat(best.value - kMostNoise));
    any |= open[i];
  }
  if (!any) return;
  u32x16 words[4];
  words_of(source, group, words);
  for (i64 i = 0; i < 4; ++i) {
    const f32x16 u = uniform(words[i]);
    for_bits(open[i] & bits_from(x[i] + noise_bound(u), splat(best.value)),
             [&](i64 j) { best.take({x[i][j] + gumbel(u[j]), first + i * kLanes + j}); });
  }
}

static i64 sample(const Sample& a, Worker& w) {
  constexpr std::uint32_t kPurpose = 0;  // Purpose.SAMPLE
  const Filters& f = a.of;
  Survey s(f.columns);
  char* const lists = survey(f, s, w);
  if (!lists) return kOutOfMemory;
  make_plans(f, s, lists, w);
  for_pieces(s, f.rows, w, 3, [&](i64 index, i64 piece) {
    const Plan& p = s.plan(index);
    if (!p.drawn) return;
    const Source source = source_of(a.seeds[index], a.sample_index[index], a.positions[index], kPurpose);
    const Worker::Range groups = s.groups_of(piece);
    Draw best = {-kInfinity, kNoColumn};
    race(p, source, p.top.column / kGroup, best);  // the likeliest first, so that few others can win
    const float floor = max(splat(p.kept.floor), splat(best.value - kMostNoise))[0];
    for_groups(p.row, floor, groups.first, groups.last, [&](i64 group) { race(p, source, group, best); });
    s.draws(index)[piece] = best;
  });
  w.barrier();
  for (i64 index = w.index; index < f.rows; index += w.count) {
    const Plan& p = s.plan(index);
    Draw best = {-kInfinity, kNoColumn};
    for (i64 i = 0; p.drawn && i < s.pieces; ++i) best.take(s.draws(index)[i]);
    a.ids[index] = p.drawn ? best.column : p.top.column;
  }
  return kDone;
}

static void write_probabilities(const Plan& p, bool warm, float* out) {
  const i64 n = p.row.columns;
  if (!p.drawn) {
    for (i64 i = 0; i < n; ++i) out[i] = warm ? __builtin_nanf("") : 0.0f;
    if (!warm) out[p.top.column] = 1.0f;
    return;
  }
  double mass = 0;
  for (i64 c = 0; c < n; c += kLanes) {
    const f32x16 x = x_of(p.row, c), kept = exp(keep(x, kept_bits(p.kept, x, c, n)));
    mass += sum_lanes(kept);
    store_row(out, n, c, kept);
  }
  const float factor = (float)(1 / mass);
  for_lanes(n, [&](auto at, auto put) { put(out, at(out) * factor); });
}

static i64 probabilities(const Probabilities& a, Worker& w) {
  const Filters& f = a.of;
  Survey s(f.columns);
  char* const lists = survey(f, s, w);
  if (!lists) return kOutOfMemory;
  make_plans(f, s, lists, w);
  for (Worker::Range r; w.next(r, f.rows, 1, 3);)
    write_probabilities(s.plan(r.first), f.temperature[r.first] > 0, a.out + r.first * f.columns);
  return kDone;
}
