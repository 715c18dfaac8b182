// Attention of one task: online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1) over tiles of 64
// keys, segment by segment.
//
//     segment = 512 keys of the sequence, wherever the rows begin      state = (o, l, m), merged in the segments' order
//
// Tiles and segments lie at multiples of their size and a masked key adds an exact zero. So the bits of a row follow
// from its own query, keys and mask, not from the rows it shares a task with, nor from who computes which segment.

struct Workspace {
  char* next;
  template <class T>
  T* take(i64 count) {
    T* p = (T*)next;
    next += (count * (i64)sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

// Bit j: the row at `offset` of its sequence sees the key tile + j. batch.py has the rule.
INLINE std::uint64_t visible(const Batch& b, const Task& t, i64 context, i64 offset, i64 tile) {
  const auto below = [](i64 n) { return n >= 64 ? ~0ull : n <= 0 ? 0ull : (1ull << n) - 1; };
  const i64 row = b.cu_q[t.seq] + offset;
  const std::uint64_t tree = b.tree_mask ? (std::uint64_t)b.tree_mask[row] : 0;
  std::uint64_t seen;
  if (tree == 0)
    seen = below(context + offset + 1 - tile);
  else if (tile >= context)
    seen = tile - context < 64 ? tree >> (tile - context) : 0;
  else
    seen = below(context - tile) | (context - tile < 64 ? tree << (context - tile) : 0);
  if (b.window) seen &= ~below(b.positions[row] - b.window + 1 - tile);
  return seen & below(t.last_key - tile) & ~below(t.first_key - tile);
}

template <class Product, class Tq, class Tkv>
struct Attend {
  using Operand = typename Product::Operand;

  const Attention& a;
  const Task& t;
  const i64 dim = a.dim, group = a.q_heads / a.kv_heads, rows = t.num_rows * group, padded = padded_rows(rows);
  const i64 context = a.batch.seq_lens[t.seq] - (a.batch.cu_q[t.seq + 1] - a.batch.cu_q[t.seq]);
  Workspace memory;
  float* const keys = memory.take<float>(kTileKeys * dim);
  float* const values = memory.take<float>(kTileKeys * dim);
  float* const widened = memory.take<float>(kTileKeys * dim);
  float* const scores = memory.take<float>(kBlockRows * kTileKeys);
  Operand* const weights = memory.take<Operand>(kBlockRows * kTileKeys);
  Operand* const queries = memory.take<Operand>(padded * dim);
  float* const whole = memory.take<float>(state_floats(rows, dim));
  float* const part = memory.take<float>(state_floats(rows, dim));
  std::uint64_t* const seen = memory.take<std::uint64_t>(padded);
  const void** const key_rows = memory.take<const void*>(kTileKeys);
  const void** const value_rows = memory.take<const void*>(kTileKeys);
  Tkv* const nothing = memory.take<Tkv>(dim);

  bool run() {
    __builtin_memset(nothing, 0, dim * sizeof(Tkv));
    __builtin_memset(weights, 0, kBlockRows * kTileKeys * sizeof(Operand));
    pack_queries();
    for (i64 s = 0; s < t.num_segments; ++s) {
      float* const mine = t.partial ? t.partial + s * state_floats(rows, dim) : s == 0 ? whole : part;
      if (!segment(t.first_segment + s, state_at(mine, rows, dim))) return false;
      if (!t.partial && s > 0) fold(state_at(whole, rows, dim), state_at(part, rows, dim), rows, dim);
    }
    if (!t.partial) finish(a, t, state_at(whole, rows, dim));
    return true;
  }

  void pack_queries() {
    for (i64 r = 0; r < t.num_rows; ++r)
      for (i64 g = 0; g < group; ++g) {
        const Tq* from = (const Tq*)a.q + (a.batch.cu_q[t.seq] + t.first_row + r) * a.q_row;
        from += (t.kv_head * group + g) * a.q_head;
        Operand* to = queries + (r * group + g) * dim;
        for (i64 d = 0; d < dim; d += kLanes) store(to + d, load(from + d));
      }
    __builtin_memset(queries + rows * dim, 0, (padded - rows) * dim * sizeof(Operand));
  }

  bool segment(i64 index, StateView state) {
    for (i64 i = 0; i < padded * dim; i += kLanes) store(state.o + i, f32x16{});
    for (i64 i = 0; i < rows; ++i) store(state.l + i * kLanes, f32x16{}), state.m[i] = -kInfinity;
    i64 tile = index * kSegmentKeys, end = tile + kSegmentKeys;
    if (tile < t.first_key) tile = t.first_key / kTileKeys * kTileKeys;
    if (end > t.last_key) end = t.last_key;
    for (; tile < end; tile += kTileKeys) {
      if (!pack_tile(tile)) return false;
      const bool masked = look(tile);
      for (i64 block = 0; block < rows; block += kBlockRows) {
        const i64 count = rows - block < kBlockRows ? rows - block : kBlockRows;
        Product::scores(count, dim, queries + block * dim, keys, scores);
        for (i64 i = 0; i < count; ++i) {
          if (!masked)
            soften<false>(i, block + i, state);
          else
            soften<true>(i, block + i, state);
        }
        Product::add_values(count, dim, weights, values, state.o + block * dim);
      }
    }
    return true;
  }

  // Keys outside of the task's range are not read: zeros stand in for them, and no row sees them.
  bool pack_tile(i64 tile) {
    const Batch& b = a.batch;
    const std::int32_t* table = b.block_table + t.seq * b.table_width;
    for (i64 j = 0; j < kTileKeys; ++j) {
      const i64 key = tile + j;
      if (key < t.first_key || key >= t.last_key) {
        key_rows[j] = value_rows[j] = nothing;
        continue;
      }
      const i64 block = table[key / b.block_size];
      if (block < 0 || block >= a.num_blocks) return false;
      const i64 at = ((block * b.block_size + key % b.block_size) * a.kv_heads + t.kv_head) * dim;
      key_rows[j] = (const Tkv*)a.k + at;
      value_rows[j] = (const Tkv*)a.v + at;
    }
    Product::template pack_keys<Tkv>(key_rows, dim, widened, keys);
    Product::template pack_values<Tkv>(value_rows, dim, values);
    return true;
  }

  // What each row sees of a tile, and whether any sees less than all of it.
  bool look(i64 tile) {
    std::uint64_t all = ~0ull;
    for (i64 r = 0; r < t.num_rows; ++r) {
      const std::uint64_t bits = visible(a.batch, t, context, t.first_row + r, tile);
      for (i64 g = 0; g < group; ++g) seen[r * group + g] = bits;
      all &= bits;
    }
    return all != ~0ull;
  }

  // Row i of the block, row m of the task: scores to weights, and the state moves to the new maximum.
  template <bool Masked>
  INLINE void soften(i64 i, i64 m, StateView state, const Attend& self) {}
};
