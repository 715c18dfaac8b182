// A mixture of gated experts, the tokens of each multiplied together: in bf16 by matrix tiles (linear.h), in fp32 by
// vectors.
//
//     ids ──sort by expert──▶ rows of x as tiles ──gate_up──▶ hidden ──gate──▶ tiles ──down──▶ routed ──weights──▶ out
//
// All experts' units of work are one list, so that threads share the few tokens of a decode and the many of a prompt
// alike. A token's sum runs over its experts in the order of its choices, and each product is that of linear.h: its
// bits do not depend on who else goes to its experts.

struct Experts {  // weights, each as linear_args.h has it, one after the other
  i64 kind;
  const void* weight;
  const float *scales, *zeros;
  i64 group, inputs, outputs;
};

struct Moe {
  i64 rows, dtype;  // of x, hidden, routed and out
  const void* x;    // [rows, gate_up.inputs]
  i64 x_row, experts, top_k;
  const i64* ids;        // [rows, top_k]
  const float* weights;  // [rows, top_k]
  Experts gate_up, down;
  i64 gelu;
  i64* lists;    // Routes
  void* hidden;  // [rows * top_k, gate_up.outputs], in the order of Routes
  void* routed;  // [rows * top_k, down.outputs], likewise
  void* out;     // [rows, down.outputs]
};

// Choices, row * top_k + which, sorted by expert. `first` and `units` say where an expert's begin, and behind the last
// where all end: among the sorted choices, and among the units of work of each product.
struct Routes {
  i64 *first, *units[2], *status, *tokens, *sorted;

  Routes(const Moe& m) {
    const i64 ends = m.experts + 1;
    first = m.lists;
    units[0] = first + ends;
    units[1] = units[0] + ends;
    status = units[1] + ends;
    tokens = status + 1;                  // [rows * top_k]: whose choice stands at each place of the sorted list
    sorted = tokens + m.rows * m.top_k;  // [rows * top_k]: the place of each choice in it
  }
};

// units: (experts' weights, expert) -> units of work of the product with the rows that `first` gives it.
template <class F>
static i64 sort_choices(const Moe& m, const Routes& r, F units) {
  const i64 choices = m.rows * m.top_k;
  __builtin_memset(r.first, 0, (m.experts + 1) * sizeof(i64));
  for (i64 i = 0; i < choices; ++i) {
    if (m.ids[i] < 0 || m.ids[i] >= m.experts) return kOutOfRange;
    ++r.first[m.ids[i] + 1];
  }
  r.units[0][0] = r.units[1][0] = 0;
  for (i64 e = 0; e < m.experts; ++e) {
    const i64 rows = r.first[e + 1];
    r.first[e + 1] += r.first[e];
    for (int i = 0; i < 2; ++i) r.units[i][e + 1] = r.units[i][e] + (rows ? units(i ? m.down : m.gate_up, e) : 0);
  }
  // Each choice behind those of its expert that came before; afterwards `first` says again where they begin.
  for (i64 i = 0; i < choices; ++i) {
    const i64 at = r.first[m.ids[i]]++;
    r.tokens[at] = i / m.top_k;
    r.sorted[i] = at;
  }
  for (i64 e = m.experts; e > 0; --e) r.first[e] = r.first[e - 1];
  r.first[0] = 0;
  return kDone;
}

// Each token's results, summed in the order of its choices.
template <class T>
static void sum_choices(const Moe& m, const Routes& r, Worker& worker, i64 phase) {
  const i64 width = m.down.outputs;
  for (Worker::Range some; worker.next(some, m.rows, piece(m.top_k * width), phase);)
    for (i64 row = some.first; row < some.last; ++row)
      for_lanes(width, [&](auto at, auto put) {
        f32x16 sum{};
        for (i64 k = row * m.top_k; k < (row + 1) * m.top_k; ++k)
          sum = fma(splat(m.weights[k]), at((const T*)m.routed + r.sorted[k] * width), sum);
        put((T*)m.out + row * width, sum);
      });
}

// `Rows` rows of x by 16 outputs, over the inputs in order.
template <int Rows>
INLINE void multiply_rows(const float* const* x, i64 inputs, const float* weight, f32x16* sums) {
  for (int row = 0; row < Rows; ++row) sums[row] = f32x16{};
  for (i64 k = 0; k < inputs; ++k) {
    const f32x16 some = load(weight + k * kLanes);
    for (int row = 0; row < Rows; ++row) sums[row] = fma(splat(x[row][k]), some, sums[row]);
  }
}

// The same products by vectors; a unit is 16 outputs of an expert for all of its rows, source(place in the sorted
// list).
template <class F>
INLINE void vector_products(const Moe& m, const Routes& r, const Experts& w, const i64* units, float* out,
                            Worker& worker, i64 phase, F source) {
  constexpr i64 kRows = 6;  // whose sums take turns in the pipelines
  for (Worker::Range some; worker.next(some, units[m.experts], 1, phase);) {
    i64 expert = 0;
    while (some.first >= units[expert + 1]) ++expert;
    const i64 tile = some.first - units[expert], tiles = units[expert + 1] - units[expert];
    const float* const weight = (const float*)w.weight + (expert * tiles + tile) * w.inputs * kLanes;
    const i64 column = tile * kLanes, count = w.outputs - column < kLanes ? w.outputs - column : kLanes;
    for (i64 at = r.first[expert]; at < r.first[expert + 1];) {
      const float* x[kRows];
      f32x16 sums[kRows];
      const i64 left = r.first[expert + 1] - at, rows = left < kRows ? 1 : kRows;
      for (i64 row = 0; row < rows; ++row) x[row] = source(at + row);
      if (rows == 1)
        multiply_rows<1>(x, w.inputs, weight, sums);
      else
        multiply_rows<kRows>(x, w.inputs, weight, sums);
      for (i64 row = 0; row < rows; ++row) store_some(out + (at + row) * w.outputs + column, sums[row], count);
      at += rows;
    }
  }
}

// Gates times ups of all choices, in the gates' own place.
template <class T>
static void gate_all(const Moe& m, Worker& worker, i64 phase) {
  const i64 width = m.down.inputs, choices = m.rows * m.top_k;
  const Gate gate = {choices, m.dtype, m.hidden, m.gate_up.outputs, width, nullptr, m.gelu};
  for (Worker::Range some; worker.next(some, choices, piece(4 * width), phase);)
    for (i64 at = some.first; at < some.last; ++at)
      gate_row<T>(gate, at, 0, width, (T*)m.hidden + at * m.gate_up.outputs);
}

static i64 vector_moe(const Moe& m, Worker& worker) {
  const Routes r(m);
  if (worker.index == 0)
    *r.status = sort_choices(m, r, [](const Experts& w, i64) { return (w.outputs + kLanes - 1) / kLanes; });
  worker.barrier();
  if (*r.status != kDone) return *r.status;
  float* const hidden = (float*)m.hidden;
  vector_products(m, r, m.gate_up, r.units[0], hidden, worker, 0,
                  [&](i64 at) { return (const float*)m.x + r.tokens[at] * m.x_row; });
  worker.barrier();
  gate_all<float>(m, worker, 1);
  worker.barrier();
  vector_products(m, r, m.down, r.units[1], (float*)m.routed, worker, 2,
                  [&](i64 at) { return hidden + at * m.gate_up.outputs; });
  worker.barrier();
  sum_choices<float>(m, r, worker, 3);
  return kDone;
}

#if HAS_AMX

INLINE i64 groups_of(const Experts& w) { return w.group < w.inputs ? up(w.inputs, w.group) : 1; }

// Rows that a product takes.
struct Inputs {
  const void* x;
  i64 x_row;
  const i64* row_of;  // null, or which row of x each place of the sorted list is
};

// The product of an expert with its rows -> its places of out.
INLINE Linear of_expert(const Experts& w, const Routes& r, i64 expert, const Inputs& from, void* out) {
  const i64 tiles = up(w.outputs, kTileOutputs), scales = expert * tiles * groups_of(w) * kTileOutputs;
  const i64 first = r.first[expert];
  Linear l{};
  l.rows = r.first[expert + 1] - first;
  l.dtype = l.out_dtype = kBfloat16;
  l.x = from.row_of ? from.x : (const bf16*)from.x + first * from.x_row;
  l.x_row = from.x_row;
  l.row_of = from.row_of ? from.row_of + first : nullptr;
  l.kind = w.kind;
  l.weight = (const char*)w.weight + expert * tiles * up(w.inputs, kTileInputs) * (kTileBytes >> w.kind);
  l.scales = w.scales ? w.scales + scales : nullptr;
  l.zeros = w.zeros ? w.zeros + scales : nullptr;
  l.group = w.group;
  l.inputs = w.inputs;
  l.outputs = w.outputs;
  l.out = (bf16*)out + first * w.outputs;
  return l;
}

// The products of all experts, by the units that this thread gets of them.
static i64 tile_products(const Routes& r, i64 experts, const Experts& w, const i64* units, const Inputs& from,
                         void* out, Worker& worker, i64 phase) {
  i64 expert = -1;
  Linear l{};
  Cut c{};
  Room room;
  for (Worker::Range some; worker.next(some, units[experts], 1, phase);) {
    if (expert < 0 || some.first >= units[expert + 1]) {
      do ++expert;
      while (some.first >= units[expert + 1]);
      l = of_expert(w, r, expert, from, out);
      c = cut(l, worker.count);
      room = room_for(l, c, worker);
      if (!room.panel) return kOutOfMemory;
      enter_tiles(c.tile_rows);
    }
    multiply_unit(l, c, some.first - units[expert], worker.count, room);
  }
  leave_tiles();
  return kDone;
}

static i64 tile_moe(const Moe& m, Worker& worker) {
  const Routes r(m);
  const Inputs rows = {m.x, m.x_row, r.tokens}, hidden = {m.hidden, m.gate_up.outputs, nullptr};
  if (worker.index == 0)
    *r.status = sort_choices(m, r, [&](const Experts& w, i64 e) {
      return count_units(cut(of_expert(w, r, e, hidden, nullptr), worker.count));
    });
  worker.barrier();
  if (*r.status != kDone) return *r.status;
  i64 status = tile_products(r, m.experts, m.gate_up, r.units[0], rows, m.hidden, worker, 0);
  worker.barrier();
  gate_all<bf16>(m, worker, 1);
  worker.barrier();
  if (const i64 second = tile_products(r, m.experts, m.down, r.units[1], hidden, m.routed, worker, 2); second != kDone)
    status = second;
  worker.barrier();
  sum_choices<bf16>(m, r, worker, 3);
  return status;
}

#endif

static i64 moe(const Moe& m, Worker& worker) {
#if HAS_AMX
  if (m.dtype == kBfloat16) return tile_moe(m, worker);
#endif
  return m.dtype == kFloat32 ? vector_moe(m, worker) : (i64)kDone;  // else nobody packs weights for it
}
