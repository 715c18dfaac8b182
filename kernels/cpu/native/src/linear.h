// out = x * weight^T + bias by bf16 matrix tiles (tiles.h), on weights that lie as such tiles (linear_args.h).
//
//   x ──lay out──▶ tiles of x, once per call ──┐
//   weight ──(codes: widen a panel)────────────┴─▶ sums ──scales, zeros, bias──▶ out
//
// The unit of work is a pair of 16 outputs for up to 512 rows. Its weights are taken a panel at a time, some inputs of
// both tiles, and a panel is multiplied with all rows before the next: so it comes from memory once and then out of the
// L1 cache, codes are widened once, and the tiles of x come out of L2. While one panel is at work the next is on its
// way. Sums wait in memory between the panels. Few rows run at the speed of memory, many at that of the tiles.
//
// A row's sums run over the inputs in order, those of a group of codes by themselves, whatever the number of rows: its
// bits do not depend on the others.

#if HAS_AMX

// How a product is cut. Inputs are counted in tiles of 32, rows in blocks of 16, outputs in tiles of 16.
struct Cut {
  i64 tile_rows;              // of a block of rows: 16, or all where there are fewer
  i64 blocks, inputs, outputs;
  i64 groups, group;          // of codes with a scale of their own that are folded one by one; 0 = sums run through
  i64 panel;                  // inputs that a panel has
  i64 reach;                  // inputs of x, a multiple of panel, that stay in L2 with the rows of a unit
  i64 unit_blocks, unit_outputs;
  i64 weight_bytes;           // of a tile as it is stored
};

constexpr i64 up(i64 n, i64 step) { return (n + step - 1) / step; }

INLINE Cut cut(const Linear& l, i64 threads) {
  constexpr i64 kPanel = 8;                        // 16 KiB of weights, in an L1 of 48 with the x that passes by
  constexpr i64 kUnitBlocks = 32;
  constexpr i64 kReach = 1 << 20, kSums = 1 << 20;  // bytes, together in an L2 of 2 MiB
  Cut c;
  c.tile_rows = least(l.rows, kBlockRows);
  c.blocks = up(l.rows, kBlockRows);
  c.inputs = up(l.inputs, kTileInputs);
  c.outputs = up(l.outputs, kTileOutputs);
  c.weight_bytes = l.kind == kFloats ? kTileBytes : l.kind == kInt8 ? kTileBytes / 2 : kTileBytes / 4;
  c.groups = l.kind == kFloats || l.group >= l.inputs ? 0 : up(l.inputs, l.group);
  c.group = c.groups ? l.group / kTileInputs : c.inputs;
  c.panel = !c.groups ? up(c.inputs, up(c.inputs, kPanel)) : c.group >= kPanel ? c.group : kPanel / c.group * c.group;
  c.unit_blocks = up(c.blocks, up(c.blocks, kUnitBlocks));
  const i64 panels = up(c.inputs, c.panel);
  const i64 reaches = up(c.unit_blocks * c.inputs * kTileBytes, kReach);
  c.reach = up(panels, reaches) * c.panel;
  c.unit_outputs = 2;
  if (reaches > 1) {  // then sums of many outputs wait for the rest of the inputs
    const i64 most = kSums / (c.unit_blocks * kTileBytes), share = up(c.outputs, threads);
    c.unit_outputs = up(least(most, share), 2) * 2;
  }
  return c;
}

// Row `row` of x, or zeros behind the last, into its line of each tile; with kInt4 the sums of its groups, too.
INLINE void lay_out(const Linear& l, const Cut& c, i64 row, char* tiles, float* group_sums) {
  const bf16* x = (const bf16*)l.x + row * l.x_row;
  char* line = tiles + row / kBlockRows * c.inputs * c.tile_rows * kLine + row % kBlockRows * kLine;
  const i64 groups = c.groups ? c.groups : 1;
  f32x16 sum{};
  for (i64 k = 0, left = row < l.rows ? l.inputs : 0; k < c.inputs; ++k, x += kTileInputs, left -= kTileInputs) {
    const __mmask32 mask = left >= kTileInputs ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    const __m512i pairs = _mm512_maskz_loadu_epi16(mask, x);
    _mm512_storeu_si512(line + k * c.tile_rows * kLine, pairs);
    if (l.kind != kInt4) continue;
    sum += (f32x16)_mm512_slli_epi32(pairs, 16) + (f32x16)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000));
    if ((k + 1) % c.group == 0 || k + 1 == c.inputs) {
      group_sums[row * groups + k / c.group] = sum_lanes(sum);
      sum = f32x16{};
    }
  }
}

// Where a unit's parts are.
struct Unit {
  const char* x;            // its first block of rows
  const float* group_sums;  // of its first row
  i64 first_row, blocks, first_output, outputs;
};

// What group `group` of the codes gives, from the sums of one row: total + scale * (sum - zero * sum of x).
INLINE f32x16 folded(const Linear& l, f32x16 sum, f32x16 scale, f32x16 zero, float x_sum, f32x16 total) {
  if (l.kind == kInt4) sum = fma(-zero, splat(x_sum), sum);
  return fma(scale, sum, total);
}

// Of one tile of sums.
INLINE void fold(const Linear& l, const Cut& c, const Unit& u, i64 block, i64 output, i64 group, const float* sums,
                 float* totals) {
  const i64 at = ((u.first_output + output) * c.groups + group) * kTileOutputs;
  const f32x16 scale = load(l.scales + at), zero = l.kind == kInt4 ? load(l.zeros + at) : f32x16{};
  const float* x_sums = u.group_sums + block * kBlockRows * c.groups + group;
  for (i64 row = 0; row < c.tile_rows; ++row, x_sums += c.groups) {
    const f32x16 total = group ? load(totals + row * kTileOutputs) : f32x16{};
    store(totals + row * kTileOutputs,
          folded(l, load(sums + row * kTileOutputs), scale, zero, l.kind == kInt4 ? *x_sums : 0.0f, total));
  }
}

// One tile of finished sums to the output.
INLINE void finish(const Linear& l, const Cut& c, const Unit& u, i64 block, i64 output, const float* sums) {
  const i64 column = (u.first_output + output) * kTileOutputs, first = u.first_row + block * kBlockRows;
  const i64 rows = least(l.rows - first, kBlockRows), count = least(l.outputs - column, kTileOutputs);
  const bool scaled = l.kind != kFloats && !c.groups;
  const f32x16 bias = l.bias ? load(l.bias + column) : f32x16{};
  const f32x16 scale = scaled ? load(l.scales + column) : f32x16{};
  const f32x16 zero = scaled && l.kind == kInt4 ? load(l.zeros + column) : f32x16{};
  const __mmask16 mask = (__mmask16)((1u << count) - 1);
  for (i64 row = 0; row < rows; ++row) {
    f32x16 total = load(sums + row * kTileOutputs);
    if (scaled)
      total = folded(l, total, scale, zero, l.kind == kInt4 ? u.group_sums[block * kBlockRows + row] : 0.0f, f32x16{});
    total += bias;
    const i64 at = (first + row) * l.outputs + column;
    if (l.out_dtype == kBfloat16)
      _mm256_mask_storeu_epi16((bf16*)l.out + at, mask, (__m256i)to_bf16(total));
    else
      _mm512_mask_storeu_ps((float*)l.out + at, mask, (__m512)total);
  }
}

// One or two blocks of rows by one or two tiles of outputs, over the inputs [k, k + count) of a panel.
template <int Rows, int Outputs>
INLINE void multiply(const Linear& l, const Cut& c, const Unit& u, i64 block, i64 output, i64 k, i64 count,
                     const char* w, i64 w_next, float* sums, float* part, Ahead& ahead) {
  const i64 x_tile = c.tile_rows * kLine, x_next = c.inputs * x_tile;
  const char* x = u.x + block * x_next + k * x_tile;
  if (!c.groups) {
    add_products<Rows, Outputs>(x, x_tile, x_next, w, w_next, count, k == 0, sums, ahead);
  } else {
    for (i64 i = 0; i < count; i += c.group) {
      add_products<Rows, Outputs>(x + i * x_tile, x_tile, x_next, w + i * kTileBytes, w_next, least(c.group, count - i),
                                  true, part, ahead);
      for (int r = 0; r < Rows; ++r)
        for (int n = 0; n < Outputs; ++n)
          fold(l, c, u, block + r, output + n, (k + i) / c.group, part + (r * Outputs + n) * 256,
               sums + (r * Outputs + n) * 256);
    }
  }
  if (k + count < c.inputs) return;
  for (int r = 0; r < Rows; ++r)
    for (int n = 0; n < Outputs; ++n) finish(l, c, u, block + r, output + n, sums + (r * Outputs + n) * 256);
}

// Some inputs of one or two tiles of outputs.
struct Panel {
  i64 output, outputs, k, count;
};

// Panel i of a unit, in the order in which they are multiplied; one of no inputs behind the last.
INLINE Panel panel_at(const Cut& c, const Unit& u, i64 i) {
  const i64 per_reach = c.reach / c.panel, pairs = up(u.outputs, 2);
  const i64 output = i / per_reach % pairs * 2, k = (i / (per_reach * pairs) * per_reach + i % per_reach) * c.panel;
  return {output, least(2, u.outputs - output), k, k < c.inputs ? least(c.panel, c.inputs - k) : 0};
}

INLINE const char* stored(const Linear& l, const Cut& c, const Unit& u, const Panel& p) {
  return (const char*)l.weight + ((u.first_output + p.output) * c.inputs + p.k) * c.weight_bytes;
}

// A panel's weights as bf16 tiles: where they are, or widened into `room`.
INLINE const char* as_tiles(const Linear& l, const Cut& c, const Panel& p, const char* codes, char* room) {
  if (l.kind == kFloats) return codes;
  for (i64 n = 0; n < p.outputs; ++n)
    for (i64 i = 0; i < p.count; ++i) {
      const char* from = codes + (n * c.inputs + i) * c.weight_bytes;
      char* const to = room + (n * c.panel + i) * kTileBytes;
      if (l.kind == kInt8)
        widen((const std::int8_t*)from, to);
      else
        widen_nibbles(from, to);
    }
  return room;
}

struct Room {
  char* panel;         // [2][panel] tiles
  float *sums, *part;  // [pairs of outputs][pairs of blocks][2][2] tiles; [2][2] tiles
};

// A unit, after which `after` comes.
static void run(const Linear& l, const Cut& c, const Unit& u, const Unit& after, const Room& room) {
  const i64 pairs = up(u.blocks, 2), panels = up(c.inputs, c.reach) * (c.reach / c.panel) * up(u.outputs, 2);
  const i64 w_next = (l.kind == kFloats ? c.inputs : c.panel) * kTileBytes;
  for (i64 i = 0; i < panels; ++i) {
    const Panel p = panel_at(c, u, i);
    if (!p.count) continue;
    const bool last = i + 1 == panels;
    const Panel next = last ? panel_at(c, after, 0) : panel_at(c, u, i + 1);
    const i64 lines = next.count * c.weight_bytes / kLine;
    Ahead ahead = {stored(l, c, last ? after : u, next), (next.outputs - 1) * c.inputs * c.weight_bytes,
                   up(lines, pairs * p.count)};
    const char* const end = ahead.at + lines * kLine;
    const char* const w = as_tiles(l, c, p, stored(l, c, u, p), room.panel);
    for (i64 block = 0; block < u.blocks; block += 2) {
      float* const sums = room.sums + (c.unit_outputs > 2 ? p.output / 2 * pairs + block / 2 : block / 2) * 1024;
      if (ahead.at >= end) ahead.count = 0;
      const bool two = block + 1 < u.blocks;
      if (two && p.outputs == 2)
        multiply<2, 2>(l, c, u, block, p.output, p.k, p.count, w, w_next, sums, room.part, ahead);
      else if (two)
        multiply<2, 1>(l, c, u, block, p.output, p.k, p.count, w, w_next, sums, room.part, ahead);
      else if (p.outputs == 2)
        multiply<1, 2>(l, c, u, block, p.output, p.k, p.count, w, w_next, sums, room.part, ahead);
      else
        multiply<1, 1>(l, c, u, block, p.output, p.k, p.count, w, w_next, sums, room.part, ahead);
    }
  }
}

static i64 tile_linear(const Linear& l, Worker& worker) {
  const Cut c = cut(l, worker.count);
  const bool few = l.rows <= kBlockRows;
  const i64 rows = few ? l.rows : c.blocks * kBlockRows, x_bytes = c.inputs * rows * kLine;
  const i64 groups = c.groups ? c.groups : 1, own = few ? x_bytes + rows * groups * 4 : 0;
  const i64 panel_bytes = 2 * c.panel * kTileBytes;
  const i64 sums_bytes = up(c.unit_outputs, 2) * up(c.unit_blocks, 2) * 4 * kTileBytes;
  char* const memory = worker.scratch(panel_bytes + sums_bytes + 4 * kTileBytes + own);
  // Of few rows every thread makes tiles of its own, which takes less than a barrier.
  char* const x = few ? memory + panel_bytes + sums_bytes + 4 * kTileBytes : (char*)l.workspace;
  float* const group_sums = (float*)(x + x_bytes);
  if (!few) {
    for (Worker::Range r; worker.next(r, rows, piece(l.inputs));)
      for (i64 row = r.first; row < r.last; ++row) lay_out(l, c, row, x, group_sums);
    worker.barrier();
  } else if (memory) {
    for (i64 row = 0; row < rows; ++row) lay_out(l, c, row, x, group_sums);
  }
  if (!memory) return kOutOfMemory;
  const Room room = {memory, (float*)(memory + panel_bytes), (float*)(memory + panel_bytes + sums_bytes)};
  const i64 wide = up(c.outputs, c.unit_outputs), units = wide * up(c.blocks, c.unit_blocks);
  const auto unit_at = [&](i64 i) __attribute__((always_inline)) {
    const i64 block = i / wide * c.unit_blocks, output = i % wide * c.unit_outputs;
    return Unit{x + block * c.inputs * c.tile_rows * kLine,
                group_sums + block * kBlockRows * groups,
                block * kBlockRows,
                least(c.unit_blocks, c.blocks - block),
                output,
                least(c.unit_outputs, c.outputs - output)};
  };
  enter_tiles(c.tile_rows);
  // The next unit is taken before this one is done, so that its weights can be on their way.
  Worker::Range now, next;
  for (bool more = worker.next(now, units, 1, 1); more; now = next) {
    more = worker.next(next, units, 1, 1);
    run(l, c, unit_at(now.first), unit_at(more ? next.first : now.first), room);
  }
  leave_tiles();
  return kDone;
}

static i64 linear(const Linear& l, Worker& worker) { return l.rows ? tile_linear(l, worker) : kDone; }

#else

static i64 linear(const Linear&, Worker&) { return kDone; }  // without tiles nobody packs weights for it

#endif
