// Few rows (16 at most) by weights in codes: a pass over some tiles of outputs side by side. Included by linear.h.
//
//     inputs k       fetch codes some KiB ahead, widen those of k
//     inputs k - 1   multiply
//     a group's end  store its sums; fold them a step later, when the next group's products are on their way
//
// A product waits 52 cycles for the one before it that adds to the same tile, so four tiles of outputs take turns.

#if HAS_AMX

// Tiles 0 to Outputs - 1 (+)= x by the widened tiles at w, one after another; between(n) behind product n.
template <int Outputs, class F>
INLINE void add_step(const char* x, const char* w, F between) {
  _tile_loadd(4, x, kLine);
  _tile_loadd(6, w, kLine);
  _tile_dpbf16ps(0, 4, 6);
  between(0);
  if constexpr (Outputs > 1) {
    _tile_loadd(7, w + kTileBytes, kLine);
    _tile_dpbf16ps(1, 4, 7);
    between(1);
  }
  if constexpr (Outputs > 2) {
    _tile_loadd(6, w + 2 * kTileBytes, kLine);
    _tile_dpbf16ps(2, 4, 6);
    between(2);
    _tile_loadd(7, w + 3 * kTileBytes, kLine);
    _tile_dpbf16ps(3, 4, 7);
    between(3);
  }
}

template <int Outputs>
INLINE void clear_step_sums() {
  _tile_zero(0);
  if constexpr (Outputs > 1) _tile_zero(1);
  if constexpr (Outputs > 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <int Outputs>
INLINE void store_step_sums(float* sums) {
  _tile_stored(0, sums, kLine);
  if constexpr (Outputs > 1) _tile_stored(1, sums + kTileFloats, kLine);
  if constexpr (Outputs > 2) {
    _tile_stored(2, sums + 2 * kTileFloats, kLine);
    _tile_stored(3, sums + 3 * kTileFloats, kLine);
  }
  __asm__ volatile("" ::: "memory");
}

// A unit of 1, 2 or 4 outputs, after which the weights of `after` come.
template <WeightKind Kind, int Outputs>
static void stream_codes(const Linear& l, const Cut& c, const Unit& u, const Unit& after, Room& room) {
  constexpr i64 kBytes = kStoredBytes<Kind>;
  constexpr i64 kAhead = 1024 / kBytes;  // of each tile of outputs; the processor goes on from there by itself
  const i64 groups = c.groups ? c.groups : 1;
  const i64 next = c.inputs * kBytes, ahead = least(kAhead, c.inputs), x_tile = c.tile_rows * kLine;
  const char* const w = (const char*)l.weight + u.first_output * next;
  const char* const then = (const char*)l.weight + (after.first_output - 1) * next;  // less the inputs of this unit
  const i64 then_last = (after.outputs - 1) * next;
  lay_out(l, c, u, 0, room);
  const auto fetch = [&](i64 k, i64 n) __attribute__((always_inline)) {
    const bool here = k + ahead < c.inputs;
    const char* const soon = (here ? w + n * next : then + least(n * next, then_last)) + (k + ahead) * kBytes;
    for (i64 i = 0; i < kBytes; i += kLine) _mm_prefetch(soon + i, _MM_HINT_T1);
  };
  const auto widened = [&](i64 k) __attribute__((always_inline)) { return room.panel + k % 2 * Outputs * kTileBytes; };
  i64 stored = 0, folded = 0, left = c.group;  // groups; inputs of the present one
  const auto fold_stored = [&]() __attribute__((always_inline)) {
    for (i64 n = 0; n < Outputs; ++n) {
      fold<Kind>(l, c, u, room.group_sums, 0, n, folded, room.part + n * kTileFloats, room.sums + n * kTileFloats);
      const i64 soon = ((after.first_output + least(n, after.outputs - 1)) * c.groups + folded) * kTileOutputs;
      _mm_prefetch(l.scales + soon, _MM_HINT_T1);
      if (Kind == kInt4 && l.zeros) _mm_prefetch(l.zeros + soon, _MM_HINT_T1);
    }
    ++folded;
  };
  clear_step_sums<Outputs>();
  const auto fetch_and_widen = [&](i64 k, i64 n) __attribute__((always_inline)) {
    fetch(k, n);
    widen_tile<Kind>(w + n * next + k * kBytes, widened(k) + n * kTileBytes);
    __asm__ volatile("" ::: "memory");
  };
  for (i64 n = 0; n < Outputs; ++n) fetch_and_widen(0, n);
  for (i64 k = 1; k <= c.inputs; ++k) {
    const char* const x = room.x + (k - 1) * x_tile;
    if (k < c.inputs)
      add_step<Outputs>(x, widened(k - 1), [&](i64 n) __attribute__((always_inline)) { fetch_and_widen(k, n); });
    else
      add_step<Outputs>(x, widened(k - 1), [](i64) {});
    if (folded < stored) fold_stored();
    if (!c.groups || (--left && k < c.inputs)) continue;
    store_step_sums<Outputs>(room.part);
    clear_step_sums<Outputs>();
    left = c.group;
    ++stored;
  }
  if (c.groups)
    fold_stored();
  else
    store_step_sums<Outputs>(room.sums);
  constexpr int kPair = Outputs > 1 ? 2 : 1;
  for (i64 row = 0; row < l.rows; ++row)
    for (i64 n = 0; n < Outputs; n += kPair)
      finish_row<Kind, kPair>(l, c, row, (u.first_output + n) * kTileOutputs, room.group_sums + row * groups,
                              room.sums + n * kTileFloats + row * kLanes, goes_past_cache(l));
}

// A unit in parts of 4, 2 and 1.
template <WeightKind Kind>
static void stream_parts(const Linear& l, const Cut& c, Unit u, const Unit& after, Room& room) {
  if (u.outputs >= 4) return stream_codes<Kind, 4>(l, c, u, after, room);
  if (u.outputs >= 2) {
    const Unit two{u.first_row, u.blocks, u.first_output, 2};
    stream_codes<Kind, 2>(l, c, two, after, room);
    u.first_output += 2;
    u.outputs -= 2;
  }
  if (u.outputs) stream_codes<Kind, 1>(l, c, u, after, room);
}

#endif
