// out = x * weight^T + bias by bf16 matrix tiles (tiles.h), on weights that lie as such tiles (linear_args.h).
//
//   x ──(lay out)──▶ tiles of x, by each thread for itself ──┐
//   weight ──(codes: widen)──────────────────────────────────┴─▶ sums ──scales, zeros, bias──▶ out
//
// With more than 16 rows tiles of x are loaded from the matrix itself where its lines allow that.
//
// The unit of work is some rows by some tiles of outputs. Which one a thread takes next is known well enough, since all
// are alike, to have its weights on their way before this one is done.
//
// Up to 16 rows, time goes by the bytes of the weights: `stream` goes through a unit once, codes are widened two steps
// before their product, sums stay in tiles.
//
// More rows share what is read (`run`). Weights are taken by panels, some inputs of both tiles, and a panel meets up to
// 512 rows before the next: it comes from memory once and then out of L1, codes are widened once, x comes out of L2,
// and sums wait in memory in between.
//
// A row's sums run over the inputs in order, those of a group of codes by themselves, whatever the number of rows: its
// bits do not depend on the others.

#if HAS_AMX

// How a product is cut. Inputs and outputs are counted in tiles, rows in blocks of 16.
struct Cut {
  i64 tile_rows;  // of a block of rows: 16, or all where there are fewer
  i64 blocks, inputs, outputs;
  i64 groups, group;              // of codes, folded one by one; with one scale for all inputs groups = 0
  i64 panel;                      // inputs of a panel
  i64 reach;                      // inputs for which x stays in L2, a multiple of `panel` where there are several
  i64 unit_blocks, unit_outputs;  // of a unit
  i64 stored_bytes;               // of a tile of weights
  bool in_place;                  // x is multiplied where it lies
};

constexpr i64 up(i64 n, i64 step) { return (n + step - 1) / step; }

// Of a unit of few rows. Codes take four tiles at a time, where all threads get some; floats two.
INLINE i64 stream_outputs(const Linear& l, i64 threads) {
  return l.kind != kFloats && l.outputs >= 8 * threads * kTileOutputs ? 4 : 2;
}

INLINE Cut cut(const Linear& l, i64 threads) {
  constexpr i64 kPanel = 16;  // 32 KiB of weights in an L1 of 48
  constexpr i64 kUnitBlocks = 32;
  constexpr i64 kReach = 1 << 20, kSums = 1 << 20;  // bytes, together in an L2 of 2 MiB
  Cut c;
  c.tile_rows = least(l.rows, kBlockRows);
  c.blocks = up(l.rows, kBlockRows);
  c.inputs = up(l.inputs, kTileInputs);
  c.outputs = up(l.outputs, kTileOutputs);
  c.stored_bytes = kTileBytes >> l.kind;
  c.groups = l.kind == kFloats || l.group >= l.inputs ? 0 : up(l.inputs, l.group);
  c.group = c.groups ? l.group / kTileInputs : c.inputs;
  c.panel = !c.groups ? up(c.inputs, up(c.inputs, kPanel)) : c.group >= kPanel ? c.group : kPanel / c.group * c.group;
  c.unit_blocks = up(c.blocks, up(c.blocks, kUnitBlocks));
  // The sum of x over a group is made in one go.
  const bool whole = c.blocks == 1 || (l.kind == kInt4 && !c.groups);
  const i64 reaches = whole ? 1 : up(c.unit_blocks * c.inputs * kTileBytes, kReach);
  c.reach = up(up(c.inputs, c.panel), reaches) * c.panel;
  // With few rows as little as can be, so that threads end together; with many enough for long pieces of a row of the
  // output; and where x does not stay in L2 over all inputs, as much as sums have room.
  const i64 share = up(c.outputs, threads), most = reaches > 1 ? kSums / (c.unit_blocks * kTileBytes) : 16;
  c.unit_outputs = c.blocks == 1 ? stream_outputs(l, threads) : up(up(share, up(share, most)), 2) * 2;
  // Rows a multiple of 1 KiB apart, of which only some inputs are wanted at a time, would meet in few sets of L2.
  const bool spread = c.reach >= c.inputs || l.x_row % (16 * kTileInputs);
  c.in_place = c.blocks > 1 && l.kind != kInt4 && !c.groups && !l.row_of && l.inputs % kTileInputs == 0 &&
               l.x_row % kTileInputs == 0 && (i64)l.x % kLine == 0 && spread;
  return c;
}

// Some rows by some outputs.
struct Unit {
  i64 first_row, blocks, first_output, outputs;
};

// The sums of a group, of 32 rows by 32 outputs, that wait to be folded.
struct Unfolded {
  i64 rows = 0;         // that are left
  const float* part;    // [2][2][16][16], of the first row left
  float* totals;        // likewise
  const float* x_sums;  // of that row, `groups` from row to row
  f32x16 scale[2], zero[2];
  __mmask16 keep;  // of the totals: none in the first group
};

// A thread's own memory.
struct Room {
  char* panel;         // [2][panel] tiles of weights
  float *sums, *part;  // [pairs of outputs][pairs of blocks][2][2] tiles; [2][2] tiles
  Unfolded waiting;
  float* group_sums;     // [rows of a unit][groups] of x
  char* x;               // [blocks][reach] tiles
  i64 row = -1, k = -1;  // of x: its first row and input
};

// Rows of x, or zeros behind the last, as tiles of the inputs [k, k + reach); with kInt4 the sums of their groups, too.
static void lay_out(const Linear& l, const Cut& c, const Unit& u, i64 k, Room& room) {
  if (room.row == u.first_row && room.k == k) return;
  room.row = u.first_row;
  room.k = k;
  const i64 end = least(k + c.reach, c.inputs), groups = c.groups ? c.groups : 1;
  for (i64 row = 0; row < u.blocks * c.tile_rows; ++row) {
    const bool exists = u.first_row + row < l.rows;
    const i64 at = exists ? u.first_row + row : 0;
    const bf16* x = (const bf16*)l.x + (l.row_of ? l.row_of[at] : at) * l.x_row;
    char* line = room.x + (row / kBlockRows * c.reach * c.tile_rows + row % kBlockRows) * kLine;
    f32x16 sum{};
    for (i64 i = k; i < end; ++i, line += c.tile_rows * kLine) {
      const i64 left = exists ? l.inputs - i * kTileInputs : 0;
      const __mmask32 mask = left >= kTileInputs ? ~0u : (1u << left) - 1;
      const __m512i pairs = _mm512_maskz_loadu_epi16(mask, x + i * kTileInputs);
      _mm512_storeu_si512(line, pairs);
      if (l.kind != kInt4) continue;
      sum += (f32x16)_mm512_slli_epi32(pairs, 16) + (f32x16)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000));
      if ((i + 1) % c.group == 0 || i + 1 == c.inputs) {
        room.group_sums[row * groups + i / c.group] = sum_lanes(sum);
        sum = f32x16{};
      }
    }
  }
  __asm__ volatile("" ::: "memory");
}

// What a group of codes gives, from the sums of one row.
template <WeightKind Kind>
INLINE f32x16 folded(f32x16 sum, f32x16 scale, f32x16 zero, const float* x_sum, f32x16 total) {
  if constexpr (Kind == kInt4) sum = fma(-zero, splat(*x_sum), sum);
  return fma(scale, sum, total);
}

template <WeightKind Kind>
INLINE f32x16 zeros(const Linear& l, i64 at) {
  return Kind == kInt4 ? l.zeros ? load(l.zeros + at) : splat(kMiddle) : f32x16{};
}

// One tile of a group's sums into the totals.
template <WeightKind Kind>
INLINE void fold(const Linear& l, const Cut& c, const Unit& u, const float* x_sums, i64 block, i64 output, i64 group,
                 const float* sums, float* totals) {
  const i64 at = ((u.first_output + output) * c.groups + group) * kTileOutputs;
  const f32x16 scale = load(l.scales + at), zero = zeros<Kind>(l, at);
  x_sums += block * kBlockRows * c.groups + group;
  const auto add = [&](i64 row, f32x16 total) __attribute__((always_inline)) {
    store(totals + row * kLanes, folded<Kind>(load(sums + row * kLanes), scale, zero, x_sums + row * c.groups, total));
  };
  if (group)
    for (i64 row = 0; row < c.tile_rows; ++row) add(row, load(totals + row * kLanes));
  else
    for (i64 row = 0; row < c.tile_rows; ++row) add(row, f32x16{});
}

// Where the sums of one or two tiles of outputs for one or two blocks of rows are, [blocks][outputs][16][16]. Where
// they are finished before those of other outputs begin, all have the same place.
INLINE i64 sums_at(const Cut& c, const Unit& u, i64 block, i64 output) {
  const i64 pair = c.reach < c.inputs ? output / 2 : 0;
  return (pair * up(u.blocks, 2) + block / 2) * 4 * kTileFloats;
}

// The first row of a block. In place the last one reaches back over rows of the block before: where there is nothing
// behind the last row to be read, 16 rows are.
INLINE i64 first_row(const Linear& l, const Cut& c, const Unit& u, i64 block) {
  const i64 row = u.first_row + block * kBlockRows;
  return c.in_place ? least(row, l.rows - kBlockRows) : row;
}

// Finished sums of one row for one or two tiles of outputs, side by side.
template <WeightKind Kind, int Outputs>
INLINE void finish_row(const Linear& l, const Cut& c, i64 row, i64 column, const float* x_sum, const float* sums,
                       bool past_cache) {
  f32x16 total[2]{};
  for (int n = 0; n < Outputs; ++n) {
    const i64 at = column + n * kTileOutputs;
    total[n] = load(sums + n * kTileFloats);
    if (Kind != kFloats && !c.groups)
      total[n] = folded<Kind>(total[n], load(l.scales + at), zeros<Kind>(l, at), x_sum, f32x16{});
    if (l.bias) total[n] += load(l.bias + at);
  }
  const i64 count = least(l.outputs - column, Outputs * kTileOutputs), at = row * l.outputs + column;
  const __mmask32 mask = count < 32 ? (1u << count) - 1 : ~0u;
  if (l.out_dtype == kBfloat16) {
    bf16* const out = (bf16*)l.out + at;
    const __m512i pair = (__m512i)_mm512_cvtne2ps_pbh((__m512)total[1], (__m512)total[0]);
    if (past_cache && count == 32 && (i64)out % kLine == 0)
      _mm512_stream_si512((__m512i*)out, pair);
    else
      _mm512_mask_storeu_epi16(out, mask, pair);
  } else {
    float* const out = (float*)l.out + at;
    _mm512_mask_storeu_ps(out, (__mmask16)mask, (__m512)total[0]);
    if constexpr (Outputs > 1) _mm512_mask_storeu_ps(out + kLanes, (__mmask16)(mask >> 16), (__m512)total[1]);
  }
}

// A large output of many rows is written past the caches, a line at a time: to own a line before writing it takes longer
// than all products with 32 rows and 900 inputs that fill it. Few rows wait for weights anyway, and what follows them
// finds their output in L2: 9 to 16 rows of a gated feed-forward 256 -> 38,912 -> 256 take 5 to 8 % less than past it.
INLINE bool goes_past_cache(const Linear& l) {
  return l.rows > kBlockRows && 2 * l.rows * l.outputs >= 1 << 19;
}

// Finished sums of one or two tiles of outputs for rows [first, last) of a unit to the output.
template <WeightKind Kind, int Outputs>
INLINE void finish(const Linear& l, const Cut& c, const Unit& u, i64 first, i64 last, i64 output, const Room& room) {
  const i64 groups = c.groups ? c.groups : 1;
  for (i64 row = first; row < least(l.rows - u.first_row, last); ++row) {
    const i64 block = row / kBlockRows, tile = block % 2 * Outputs;
    const float* const sums = room.sums + sums_at(c, u, block, output) + tile * kTileFloats +
                              (u.first_row + row - first_row(l, c, u, block)) * kLanes;
    finish_row<Kind, Outputs>(l, c, u.first_row + row, (u.first_output + output) * kTileOutputs,
                              room.group_sums + row * groups, sums, goes_past_cache(l));
  }
}

// Few rows: a unit, after which the weights of `after` come.
template <int Outputs>
static void stream(const Linear& l, const Cut& c, const Unit& u, const Unit& after, Room& room) {
  constexpr i64 kAhead = 4;  // tiles of weights between their prefetch and their use
  const i64 next = c.inputs * kTileBytes, ahead = least(kAhead, c.inputs), x_tile = c.tile_rows * kLine;
  const char* const w = (const char*)l.weight + u.first_output * next;
  const char* const then = (const char*)l.weight + (after.first_output - 1) * next;  // less the inputs of this unit
  const i64 then_apart = after.outputs > 1 ? next : 0;
  lay_out(l, c, u, 0, room);
  _tile_zero(0);
  if constexpr (Outputs > 1) _tile_zero(1);
  for (i64 k = 0; k < c.inputs; ++k) {
    const bool here = k + ahead < c.inputs;
    const char* const soon = (here ? w : then) + (k + ahead) * kTileBytes;
    const i64 apart = here ? next : then_apart;
    for (i64 i = 0; i < kTileBytes; i += kLine) {
      _mm_prefetch(soon + i, _MM_HINT_T0);
      if constexpr (Outputs > 1) _mm_prefetch(soon + apart + i, _MM_HINT_T0);
    }
    const char* const tile = w + k * kTileBytes;
    _tile_loadd(4, room.x + k * x_tile, kLine);
    _tile_loadd(6, tile, kLine);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Outputs > 1) {
      _tile_loadd(7, tile + next, kLine);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, room.sums, kLine);
  if constexpr (Outputs > 1) _tile_stored(1, room.sums + kTileFloats, kLine);
  __asm__ volatile("" ::: "memory");
  finish<kFloats, Outputs>(l, c, u, 0, kBlockRows, 0, room);
}

#include "linear_few_codes.h"

// Some inputs of one or two tiles of outputs.
struct Panel {
  i64 output, outputs, k, count;
};

// Panel i of a unit, in the order in which they are multiplied; some have no inputs where reaches are uneven.
INLINE Panel panel_at(const Cut& c, const Unit& u, i64 i) {
  const i64 per_reach = c.reach / c.panel, pairs = up(u.outputs, 2);
  const i64 output = i / per_reach % pairs * 2, k = (i / (per_reach * pairs) * per_reach + i % per_reach) * c.panel;
  return {output, least(2, u.outputs - output), k, k < c.inputs ? least(c.panel, c.inputs - k) : 0};
}

INLINE const char* stored(const Linear& l, const Cut& c, const Unit& u, const Panel& p) {
  return (const char*)l.weight + ((u.first_output + p.output) * c.inputs + p.k) * c.stored_bytes;
}

#include "linear_many_codes.h"

template <WeightKind Kind>
INLINE void widen_panel(const Cut& c, const Panel& p, const char* codes, char* room, Ahead& ahead) {
  for (i64 i = 0; i < p.count; ++i) {
    ahead.step();
    for (i64 n = 0; n < p.outputs; ++n)
      widen_tile<Kind>(codes + (n * c.inputs + i) * kStoredBytes<Kind>, room + (n * c.panel + i) * kTileBytes);
  }
}

template <int N>
struct Count {
  static constexpr int value = N;
};

// One or two blocks of rows by the one or two tiles of outputs of a panel, whose weights are at w.
template <WeightKind Kind, int Rows, int Outputs>
INLINE void multiply(const Linear& l, const Cut& c, const Unit& u, const Panel& p, i64 block, const char* w, i64 w_next,
                     Room& room, Ahead& ahead) {
  const i64 row = first_row(l, c, u, block), x_line = c.in_place ? 2 * l.x_row : kLine;
  const i64 x_tile = c.in_place ? kLine : c.tile_rows * kLine;
  const i64 x_next = c.in_place ? (first_row(l, c, u, block + 1) - row) * x_line : c.reach * x_tile;
  const char* const x =
      c.in_place ? (const char*)l.x + row * x_line + p.k * x_tile : room.x + block * x_next + (p.k - room.k) * x_tile;
  float* const sums = room.sums + sums_at(c, u, block, p.output);
  if (!c.groups) {
    add_products<Rows, Outputs>(x, x_line, x_tile, x_next, w, w_next, p.count, p.k == 0, sums, ahead);
    return;
  }
  if constexpr (Rows == 2 && Outputs == 2) return multiply_groups<Kind>(l, c, u, p, block, w, w_next, room, ahead);
  fold_all<Kind>(room.waiting, c.groups);
  for (i64 i = 0; i < p.count; i += c.group) {
    add_products<Rows, Outputs>(x + i * x_tile, x_line, x_tile, x_next, w + i * kTileBytes, w_next,
                                least(c.group, p.count - i), true, room.part, ahead);
    for (int r = 0; r < Rows; ++r)
      for (int n = 0; n < Outputs; ++n) {
        const i64 tile = (r * Outputs + n) * kTileFloats;
        fold<Kind>(l, c, u, room.group_sums, block + r, p.output + n, (p.k + i) / c.group, room.part + tile,
                   sums + tile);
      }
  }
}

constexpr i64 kLeg = 2;  // panels whose weights are fetched together: of 900 inputs and two tiles of outputs, 14 pages

// The weights of the leg that begins with panel i of a unit, while `steps` are done.
INLINE Ahead fetch_leg(const Linear& l, const Cut& c, const Unit& u, i64 i, i64 steps) {
  constexpr i64 kFewBlocks = 8;
  const Panel p = panel_at(c, u, i);
  const i64 end = least(c.inputs, p.k / c.reach * c.reach + c.reach);
  const i64 inputs = p.count ? least(kLeg * c.panel, end - p.k) : 0;
  return Ahead(stored(l, c, u, p), (p.outputs - 1) * c.inputs * c.stored_bytes, inputs * c.stored_bytes,
               u.blocks <= kFewBlocks, steps);
}

// Many rows: a unit, after which the weights of `after` come.
template <WeightKind Kind>
static void run(const Linear& l, const Cut& c, const Unit& u, const Unit& after, Room& room) {
  const i64 per_reach = c.reach / c.panel, panels = up(c.inputs, c.reach) * per_reach * up(u.outputs, 2);
  const i64 w_next = (Kind == kFloats ? c.inputs : c.panel) * kTileBytes;
  Ahead ahead;
  for (i64 i = 0; i < panels; ++i) {
    const Panel p = panel_at(c, u, i);
    if (!p.count) continue;
    if (!c.in_place) lay_out(l, c, u, p.k / c.reach * c.reach, room);
    if (i % per_reach % kLeg == 0) {
      const i64 next = i + least(kLeg, per_reach - i % per_reach);
      const i64 steps = (next - i) * p.count * (up(u.blocks, 2) + (Kind != kFloats));
      ahead = next < panels ? fetch_leg(l, c, u, next, steps) : fetch_leg(l, c, after, 0, steps);
    }
    const char* w = stored(l, c, u, p);
    if constexpr (Kind != kFloats) {
      widen_panel<Kind>(c, p, w, room.panel, ahead);
      w = room.panel;
    }
    for (i64 block = 0; block < u.blocks; block += 2) {
      const auto multiply_by = [&](auto rows, auto outputs) __attribute__((always_inline)) {
        constexpr int kRows = decltype(rows)::value, kOutputs = decltype(outputs)::value;
        multiply<Kind, kRows, kOutputs>(l, c, u, p, block, w, w_next, room, ahead);
        if (p.k + p.count < c.inputs) return;
        fold_all<Kind>(room.waiting, c.groups);
        finish<Kind, kOutputs>(l, c, u, block * kBlockRows, (block + kRows) * kBlockRows, p.output, room);
      };
      if (block + 1 < u.blocks)
        p.outputs == 2 ? multiply_by(Count<2>{}, Count<2>{}) : multiply_by(Count<2>{}, Count<1>{});
      else
        p.outputs == 2 ? multiply_by(Count<1>{}, Count<2>{}) : multiply_by(Count<1>{}, Count<1>{});
    }
  }
}

template <WeightKind Kind>
static void product(const Linear& l, const Cut& c, const Unit& u, const Unit& after, Room& room) {
  if (l.rows > kBlockRows)
    run<Kind>(l, c, u, after, room);
  else if constexpr (Kind == kFloats)
    u.outputs == 2 ? stream<2>(l, c, u, after, room) : stream<1>(l, c, u, after, room);
  else
    stream_parts<Kind>(l, c, u, after, room);
}

// A thread's memory for such a product; a null panel where there is none.
static Room room_for(const Linear& l, const Cut& c, Worker& worker) {
  const i64 rows = c.unit_blocks * c.tile_rows;
  const i64 panel_bytes = 2 * (c.panel > 4 ? c.panel : 4) * kTileBytes, part_bytes = 4 * kTileBytes;
  const i64 sums_bytes = (c.reach < c.inputs ? up(c.unit_outputs, 2) : 1) * up(c.unit_blocks, 2) * 4 * kTileBytes;
  const i64 group_bytes = up(4 * rows * (c.groups ? c.groups : 1), kLine) * kLine;
  Room room;
  room.panel =
      worker.scratch(panel_bytes + part_bytes + sums_bytes + group_bytes + (c.in_place ? 0 : rows * c.reach * kLine));
  if (!room.panel) return room;
  room.part = (float*)(room.panel + panel_bytes);
  room.sums = room.part + part_bytes / 4;
  room.group_sums = room.sums + sums_bytes / 4;
  room.x = (char*)room.group_sums + group_bytes;
  return room;
}

INLINE i64 count_units(const Cut& c) { return up(c.outputs, c.unit_outputs) * up(c.blocks, c.unit_blocks); }

INLINE Unit unit_at(const Cut& c, i64 i) {
  const i64 wide = up(c.outputs, c.unit_outputs);
  const i64 block = i / wide * c.unit_blocks, output = i % wide * c.unit_outputs;
  return Unit{block * kBlockRows, least(c.unit_blocks, c.blocks - block), output,
              least(c.unit_outputs, c.outputs - output)};
}

// The i-th unit taken, after which this thread is likely to take the one that is `threads` further on.
static void multiply_unit(const Linear& l, const Cut& c, i64 i, i64 threads, Room& room) {
  const i64 units = count_units(c);
  const auto taken = [&](i64 at) { return unit_at(c, c.blocks == 1 ? in_stretches(at, units, threads) : at); };
  const Unit unit = taken(i), after = taken(least(i + threads, units - 1));
  if (l.kind == kFloats)
    product<kFloats>(l, c, unit, after, room);
  else if (l.kind == kInt8)
    product<kInt8>(l, c, unit, after, room);
  else
    product<kInt4>(l, c, unit, after, room);
  _mm_sfence();  // behind what was written past the caches
}

static i64 tile_linear(const Linear& l, Worker& worker) {
  const Cut c = cut(l, worker.count);
  Room room = room_for(l, c, worker);
  if (!room.panel) return kOutOfMemory;
  enter_tiles(c.tile_rows);
  for (Worker::Range r; worker.next(r, count_units(c), 1);) multiply_unit(l, c, r.first, worker.count, room);
  leave_tiles();
  return kDone;
}

static i64 linear(const Linear& l, Worker& worker) {
  if (l.dtype != kBfloat16) return vector_linear(l, worker);
  return l.rows ? tile_linear(l, worker) : kDone;
}

// Of few rows: the outputs that a thread begins with.
INLINE Soon first_weights(const Linear& l, i64 index, i64 threads) {
  const i64 outputs = up(l.outputs, kTileOutputs), width = stream_outputs(l, threads), units = outputs / width;
  if (l.rows > kBlockRows || l.dtype != kBfloat16 || index >= units) return {};
  const i64 unit = width * up(l.inputs, kTileInputs) * (kTileBytes >> l.kind);
  return {(const char*)l.weight + in_stretches(index, up(outputs, width), threads) * unit, unit / kLine};
}

#else

static i64 linear(const Linear& l, Worker& worker) { return vector_linear(l, worker); }
INLINE Soon first_weights(const Linear&, i64, i64) { return {}; }

#endif
