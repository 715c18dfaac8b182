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
  i64* lists;         // Routes
  void* tiles;        // x, later hidden, as tiles: as many rows as Routes has places
  float* group_sums;  // of kInt4: [places][groups]
  void* hidden;       // [rows * top_k, gate_up.outputs]
  void* routed;       // [rows * top_k, down.outputs]
  void* out;          // [rows, down.outputs]
};

// Choices, row * top_k + which, sorted by expert. `first`, `places` and `units` say where an expert's begin, and behind
// the last where all end: among the sorted choices; among the rows of tiles, where blocks of 16 are whole for experts
// with more rows than that; and among the units of work of each product.
struct Routes {
  i64 *first, *places, *units[2], *order, *sorted, *status;

  Routes(const Moe& m) {
    const i64 ends = m.experts + 1;
    first = m.lists;
    places = first + ends;
    units[0] = places + ends;
    units[1] = units[0] + ends;
    status = units[1] + ends;
    order = status + 1;                 // [rows * top_k]: the choice at each place in the sorted list
    sorted = order + m.rows * m.top_k;  // [rows * top_k]: the place of each choice in it
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
  r.places[0] = r.units[0][0] = r.units[1][0] = 0;
  for (i64 e = 0; e < m.experts; ++e) {
    const i64 rows = r.first[e + 1];
    r.first[e + 1] += r.first[e];
    r.places[e + 1] = r.places[e] + (rows > kBlockRows ? (rows + kBlockRows - 1) / kBlockRows * kBlockRows : rows);
    for (int i = 0; i < 2; ++i) r.units[i][e + 1] = r.units[i][e] + (rows ? units(i ? m.down : m.gate_up, e) : 0);
  }
  // Each choice behind those of its expert that came before; afterwards `first` says again where they begin.
  for (i64 i = 0; i < choices; ++i) {
    const i64 at = r.first[m.ids[i]]++;
    r.order[at] = i;
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

static i64 vector_moe(const Moe& m, Worker& worker) {
  const Routes r(m);
  if (worker.index == 0)
    *r.status = sort_choices(m, r, [](const Experts& w, i64) { return (w.outputs + kLanes - 1) / kLanes; });
  worker.barrier();
  if (*r.status != kDone) return *r.status;
  float* const hidden = (float*)m.hidden;
  vector_products(m, r, m.gate_up, r.units[0], hidden, worker, 0,
                  [&](i64 at) { return (const float*)m.x + r.order[at] / m.top_k * m.x_row; });
  worker.barrier();
  const i64 width = m.down.inputs, choices = m.rows * m.top_k;
  const Gate gate = {choices, kFloat32, hidden, m.gate_up.outputs, width, nullptr, m.gelu};
  for (Worker::Range some; worker.next(some, choices, piece(4 * width), 1);)
    for (i64 at = some.first; at < some.last; ++at)
      gate_row<float>(gate, at, 0, width, hidden + at * m.gate_up.outputs);  // in the gate's own place
  worker.barrier();
  vector_products(m, r, m.down, r.units[1], (float*)m.routed, worker, 2,
                  [&](i64 at) { return hidden + at * m.gate_up.outputs; });
  worker.barrier();
  sum_choices<float>(m, r, worker, 3);
  return kDone;
}

#if HAS_AMX

constexpr i64 kBfloat16Bytes = 2;

INLINE i64 groups_of(const Experts& w) { return w.group < w.inputs ? up(w.inputs, w.group) : 1; }

// The product of an expert with its rows of `x`, which is as tiles already: [choices, inputs] -> out.
INLINE Linear of_expert(const Experts& w, const Routes& r, i64 expert, void* out) {
  const i64 tiles = up(w.outputs, kTileOutputs), scales = expert * tiles * groups_of(w) * kTileOutputs;
  Linear l{};
  l.rows = r.first[expert + 1] - r.first[expert];
  l.dtype = l.out_dtype = kBfloat16;
  l.kind = w.kind;
  l.weight = (const char*)w.weight + expert * tiles * up(w.inputs, kTileInputs) * (kTileBytes >> w.kind);
  l.scales = w.scales ? w.scales + scales : nullptr;
  l.zeros = w.zeros ? w.zeros + scales : nullptr;
  l.group = w.group;
  l.inputs = w.inputs;
  l.outputs = w.outputs;
  l.out = (char*)out + r.first[expert] * w.outputs * kBfloat16Bytes;
  return l;
}

INLINE i64 count_units(const Cut& c) { return up(c.outputs, c.unit_outputs) * up(c.blocks, c.unit_blocks); }

// Every place among the tiles: source(place in the sorted list) gives the row of an expert that is laid out there.
template <class F>
INLINE void lay_out_all(const Moe& m, const Routes& r, const Experts& w, i64 cost, Worker& worker, i64 phase,
                        F source) {
  const i64 inputs = up(w.inputs, kTileInputs), groups = groups_of(w);
  for (Worker::Range some; worker.next(some, r.places[m.experts], piece(cost * w.inputs), phase);)
    for (i64 expert = 0, place = some.first; place < some.last; ++expert) {
      const i64 first = r.places[expert], end = least(r.places[expert + 1], some.last);
      if (place >= end) continue;
      Linear l = of_expert(w, r, expert, nullptr);
      const Cut c = cut(l, worker.count);
      for (; place < end; ++place) {
        const i64 row = place - first;
        if (row < l.rows) l.x = source(r.first[expert] + row);  // by a stride of 0 it is every row
        lay_out(l, c, row, (char*)m.tiles + first * inputs * kLine, m.group_sums + first * groups);
      }
    }
}

// The products of all experts, by the units that this thread gets of them.
static i64 multiply_all(const Moe& m, const Routes& r, const Experts& w, const i64* units, void* out, Worker& worker,
                        i64 phase) {
  const i64 inputs = up(w.inputs, kTileInputs), groups = groups_of(w);
  i64 status = kDone, expert = -1;
  Linear l{};
  Cut c{};
  Room room{};
  for (Worker::Range some; worker.next(some, units[m.experts], 1, phase);) {
    if (expert < 0 || some.first >= units[expert + 1]) {
      do ++expert;
      while (some.first >= units[expert + 1]);
      l = of_expert(w, r, expert, out);
      c = cut(l, worker.count);
      const i64 panel_bytes = 2 * (c.panel > 4 ? c.panel : 4) * kTileBytes, part_bytes = 4 * kTileBytes;
      const i64 sums_bytes = up(c.unit_outputs, 2) * up(c.unit_blocks, 2) * 4 * kTileBytes;
      char* const memory = worker.scratch(panel_bytes + part_bytes + sums_bytes);
      if (!memory) {
        status = kOutOfMemory;
        break;
      }
      room = {memory, (float*)(memory + panel_bytes + part_bytes), (float*)(memory + panel_bytes)};
      enter_tiles(c.tile_rows);
    }
    const i64 wide = up(c.outputs, c.unit_outputs);
    const auto unit_at = [&](i64 i) __attribute__((always_inline)) {
      const i64 block = i / wide * c.unit_blocks, output = i % wide * c.unit_outputs;
      const i64 place = r.places[expert] + block * kBlockRows;
      return Unit{(const char*)m.tiles + place * inputs * kLine,
                  m.group_sums + place * groups,
                  block * kBlockRows,
                  least(c.unit_blocks, c.blocks - block),
                  output,
                  least(c.unit_outputs, c.outputs - output)};
    };
    const i64 i = some.first - units[expert], likely = least(i + worker.count, units[expert + 1] - units[expert] - 1);
    if (w.kind == kFloats)
      product<kFloats>(l, c, unit_at(i), unit_at(likely), room);
    else if (w.kind == kInt8)
      product<kInt8>(l, c, unit_at(i), unit_at(likely), room);
    else
      product<kInt4>(l, c, unit_at(i), unit_at(likely), room);
  }
  leave_tiles();
  return status;
}

static i64 tile_moe(const Moe& m, Worker& worker) {
  const Routes r(m);
  if (worker.index == 0)
    *r.status = sort_choices(
        m, r, [&](const Experts& w, i64 e) { return count_units(cut(of_expert(w, r, e, nullptr), worker.count)); });
  worker.barrier();
  if (*r.status != kDone) return *r.status;
  lay_out_all(m, r, m.gate_up, 1, worker, 0,
              [&](i64 at) { return (const bf16*)m.x + r.order[at] / m.top_k * m.x_row; });
  worker.barrier();
  i64 status = multiply_all(m, r, m.gate_up, r.units[0], m.hidden, worker, 1);
  worker.barrier();
  const Gate gate = {m.rows * m.top_k, kBfloat16, m.hidden, m.gate_up.outputs, m.down.inputs, nullptr, m.gelu};
  lay_out_all(m, r, m.down, 4, worker, 2, [&](i64 at) {
    bf16* const hidden = (bf16*)m.hidden + at * m.gate_up.outputs;
    gate_row<bf16>(gate, at, 0, m.down.inputs, hidden);  // in the gate's own place
    return hidden;
  });
  worker.barrier();
  if (const i64 second = multiply_all(m, r, m.down, r.units[1], m.routed, worker, 3); second != kDone) status = second;
  worker.barrier();
  sum_choices<bf16>(m, r, worker, 4);
  return status;
}

#endif

static i64 moe(const Moe& m, Worker& worker) {
#if HAS_AMX
  if (m.dtype == kBfloat16) return tile_moe(m, worker);
#endif
  return m.dtype == kFloat32 ? vector_moe(m, worker) : (i64)kDone;  // else nobody packs weights for it
}
