// Many rows by weights in codes with groups. Included by linear.h.
//
//     products of a group, 2 x 2 tiles ──▶ part ──▶ folded into the totals among the last products of the next group
//
// The fold of 2 x 2 tiles takes half as long as the products of a group of 128 inputs, on units that these leave idle;
// but only what stands among them in the program runs beside them, and not before the part has been stored.

#if HAS_AMX

template <WeightKind Kind>
INLINE Unfolded unfolded(const Linear& l, const Cut& c, const Unit& u, const Room& room, i64 block, i64 output,
                         i64 group) {
  Unfolded f;
  f.rows = 2 * kBlockRows;
  f.part = room.part;
  f.totals = room.sums + sums_at(c, u, block, output);
  f.x_sums = room.group_sums + block * kBlockRows * c.groups + group;
  for (i64 n = 0; n < 2; ++n) {
    const i64 at = ((u.first_output + output + n) * c.groups + group) * kTileOutputs;
    f.scale[n] = load(l.scales + at);
    f.zero[n] = zeros<Kind>(l, at);
  }
  f.keep = group ? 0xffff : 0;
  return f;
}

constexpr i64 kFoldRows = 4;  // at a time

template <WeightKind Kind>
INLINE void fold_some(Unfolded& f, i64 groups) {
  for (i64 row = 0; row < kFoldRows; ++row, f.x_sums += groups)
    for (i64 n = 0; n < 2; ++n) {
      const i64 at = n * kTileFloats + row * kLanes;
      const f32x16 total = (f32x16)_mm512_maskz_loadu_ps(f.keep, f.totals + at);
      store(f.totals + at, folded<Kind>(load(f.part + at), f.scale[n], f.zero[n], f.x_sums, total));
    }
  f.rows -= kFoldRows;
  const i64 step = kFoldRows * kLanes + (f.rows == kBlockRows ? kTileFloats : 0);  // over a tile to the next 16 rows
  f.part += step;
  f.totals += step;
}

template <WeightKind Kind>
static void fold_all(Unfolded& f, i64 groups) {
  while (f.rows) fold_some<Kind>(f, groups);
}

// part = x * weights over `steps` tiles of inputs, for 2 x 2 tiles as add_products has them; what `part` held waits,
// and is folded among the last products.
template <WeightKind Kind>
__attribute__((noinline)) static void multiply_and_fold(const char* x, i64 x_tile, i64 x_next, const char* w,
                                                        i64 w_next, i64 steps, float* part, Ahead& ahead,
                                                        Unfolded& waiting, i64 groups) {
  Unfolded f = waiting;
  i64 first = 4 * steps - 2 * kBlockRows / kFoldRows;  // products before the first rows are folded
  const auto fold_meanwhile = [&]() __attribute__((always_inline)) {
    if (--first < 0 && f.rows) fold_some<Kind>(f, groups);
  };
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (i64 i = 0; i < steps; ++i, x += x_tile, w += kTileBytes) {
    ahead.step();
    _tile_stream_loadd(4, x, kLine);
    _tile_loadd(6, w, kLine);
    _tile_dpbf16ps(0, 4, 6);
    fold_meanwhile();
    _tile_loadd(7, w + w_next, kLine);
    _tile_dpbf16ps(1, 4, 7);
    fold_meanwhile();
    _tile_stream_loadd(5, x + x_next, kLine);
    _tile_dpbf16ps(2, 5, 6);
    fold_meanwhile();
    _tile_dpbf16ps(3, 5, 7);
    fold_meanwhile();
  }
  fold_all<Kind>(f, groups);
  _tile_stored(0, part, kLine);
  _tile_stored(1, part + kTileFloats, kLine);
  _tile_stored(2, part + 2 * kTileFloats, kLine);
  _tile_stored(3, part + 3 * kTileFloats, kLine);
  __asm__ volatile("" ::: "memory");
}

// Two blocks of rows by the two tiles of outputs of a panel, widened at w.
template <WeightKind Kind>
INLINE void multiply_groups(const Linear& l, const Cut& c, const Unit& u, const Panel& p, i64 block, const char* w,
                            i64 w_next, Room& room, Ahead& ahead) {
  const i64 x_tile = c.tile_rows * kLine, x_next = c.reach * x_tile;
  const char* const x = room.x + block * x_next + (p.k - room.k) * x_tile;
  for (i64 i = 0; i < p.count; i += c.group) {
    const i64 group = (p.k + i) / c.group;
    multiply_and_fold<Kind>(x + i * x_tile, x_tile, x_next, w + i * kTileBytes, w_next, least(c.group, p.count - i),
                            room.part, ahead, room.waiting, c.groups);
    room.waiting = unfolded<Kind>(l, c, u, room, block, p.output, group);
  }
}

#endif
