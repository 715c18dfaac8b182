// out = x * weight^T + bias by bf16 matrix tiles, on weights that lie as such tiles (linear.py packs them).
//
// Tile (n, k) holds 16 outputs and 32 inputs as the second factor of a tile product wants them: word [pair of inputs]
// [output]. Tiles of 16 outputs follow each other over the inputs, so every thread reads the weights once, in order:
// few rows run at the speed of memory. x is the first factor as it lies. A row's sums run over the inputs in order,
// whatever the number of rows: its bits do not depend on the others.

struct Linear {  // bf16; rows beyond 16 come in multiples of 16, inputs in multiples of 32
  i64 rows;
  const void* x;       // [rows, inputs]
  const void* weight;  // [outputs / 16, inputs / 32, 16, 16, 2]: tiles of pairs of inputs by outputs, padded with zeros
  const float* bias;   // [outputs, padded to 16] or null
  i64 inputs, outputs;
  void* out;  // [rows, outputs]
};

#if HAS_AMX

constexpr i64 kTileInputs = 32, kTileOutputs = 16, kTileElements = kTileInputs * kTileOutputs;

// One row of sums to bf16, with the bias; `count` of the 16 outputs exist.
INLINE void finish(const Linear& l, const float* sums, i64 rows, i64 row, i64 output) {
  const i64 count = l.outputs - output < kTileOutputs ? l.outputs - output : kTileOutputs;
  bf16* out = (bf16*)l.out + row * l.outputs + output;
  const f32x16 bias = l.bias ? load(l.bias + output) : f32x16{};
  for (i64 i = 0; i < rows; ++i, out += l.outputs) {
    const u16x16 halves = to_bf16(load(sums + i * kTileOutputs) + bias);
    if (count == kTileOutputs)
      __builtin_memcpy(out, &halves, sizeof halves);
    else
      __builtin_memcpy(out, &halves, count * sizeof(bf16));
  }
}

// Sums stay in tiles 0 to 3 over all inputs; tiles 4 and 5 are of x, 6 and 7 of the weights.
template <int Outputs>
INLINE void one_by(const Linear& l, i64 row, i64 output, float* sums) {
  const bf16* x = (const bf16*)l.x + row * l.inputs;
  const bf16* w = (const bf16*)l.weight + output * l.inputs;
  const i64 next = kTileOutputs * l.inputs, rows = l.rows < kBlockRows ? l.rows : kBlockRows;
  _tile_zero(0);
  if constexpr (Outputs > 1) _tile_zero(1);
  if constexpr (Outputs > 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (i64 k = 0; k < l.inputs; k += kTileInputs, w += kTileElements) {
    _tile_loadd(4, x + k, 2 * l.inputs);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Outputs > 1) {
      _tile_loadd(7, w + next, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (Outputs > 2) {
      _tile_loadd(6, w + 2 * next, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(7, w + 3 * next, 64);
      _tile_dpbf16ps(3, 4, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (Outputs > 1) _tile_stored(1, sums + 256, 64);
  if constexpr (Outputs > 2) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
  __asm__ volatile("" ::: "memory");
  for (i64 i = 0; i < Outputs; ++i) finish(l, sums + 256 * i, rows, row, output + i * kTileOutputs);
}

INLINE void two_by_two(const Linear& l, i64 row, i64 output, float* sums) {
  const bf16* x = (const bf16*)l.x + row * l.inputs;
  const bf16* below = x + kBlockRows * l.inputs;
  const bf16* w = (const bf16*)l.weight + output * l.inputs;
  const i64 next = kTileOutputs * l.inputs;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (i64 k = 0; k < l.inputs; k += kTileInputs, w += kTileElements) {
    _tile_loadd(4, x + k, 2 * l.inputs);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + next, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, below + k, 2 * l.inputs);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
  __asm__ volatile("" ::: "memory");
  for (i64 i = 0; i < 4; ++i)
    finish(l, sums + 256 * i, kBlockRows, row + i / 2 * kBlockRows, output + i % 2 * kTileOutputs);
}

// Outputs of the tiles [first, last) for rows [row, end): the tiles of a few outputs stay in the cache over all rows.
static void tiles(const Linear& l, i64 first, i64 last) {
  alignas(64) float sums[4 * 256];
  const i64 rows = l.rows < kBlockRows ? l.rows : kBlockRows;
  TileProduct::enter(rows);
  // Rows at a time: those whose inputs, 1 MiB of them, stay in a 2 MiB L2 beside the weights that pass by.
  const i64 at_once = (1 << 19) / l.inputs / (2 * kBlockRows) * (2 * kBlockRows) + 2 * kBlockRows;
  for (i64 top = 0; top < l.rows; top += at_once) {
    const i64 end = top + at_once < l.rows ? top + at_once : l.rows;
    const i64 wide = l.rows > kBlockRows ? 2 : 4;  // outputs at once, in tiles
    for (i64 tile = first; tile < last;) {
      const i64 now = tile + wide <= last ? wide : 1, output = tile * kTileOutputs;
      for (i64 row = top; row < end;) {
        const bool two = now == 2 && end - row >= 2 * kBlockRows;
        if (two)
          two_by_two(l, row, output, sums);
        else if (now == 4)
          one_by<4>(l, row, output, sums);
        else if (now == 2)
          one_by<2>(l, row, output, sums);
        else
          one_by<1>(l, row, output, sums);
        row += two ? 2 * kBlockRows : kBlockRows;
      }
      tile += now;
    }
  }
  TileProduct::leave();
}

static i64 linear(const Linear& l, Worker& worker) {
  if (l.rows == 0) return kDone;
  for (Worker::Range r; worker.next(r, (l.outputs + 15) / 16, 8);) tiles(l, r.first, r.last);
  return kDone;
}

#else

static i64 linear(const Linear&, Worker&) { return kDone; }  // without tiles nobody packs weights for it

#endif
