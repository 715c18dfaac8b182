// Attention of one task: online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1) over tiles of 64
// keys, segment by segment.
//
//     segment = 512 keys of the sequence, wherever the rows begin      state = (o, l, m), merged in the segments' order
//
// Tiles and segments lie at multiples of their size and a masked key adds an exact zero. So the bits of a row follow
// from its own query, keys and mask, not from the rows it shares a task with, nor from who computes which segment.
// Nor, therefore, from whether a prefix was summed for a group of sequences at once: its rows go on from that state.

static void clear(StateView state, i64 rows, i64 dim) {
  for (i64 i = 0; i < padded_rows(rows) * dim; i += kLanes) store(state.o + i, f32x16{});
  for (i64 m = 0; m < rows; ++m) {
    store(state.l + m * kLanes, f32x16{});
    state.m[m] = -kInfinity;
  }
}

// whole += part, two sums over disjoint keys.
static void fold(StateView whole, StateView part, i64 rows, i64 dim) {
  for (i64 m = 0; m < rows; ++m) {
    if (sum_lanes(load(part.l + m * kLanes)) == 0) continue;  // it saw nothing
    const float top = whole.m[m] > part.m[m] ? whole.m[m] : part.m[m];
    const f32x16 old = exp2(splat(whole.m[m] - top)), young = exp2(splat(part.m[m] - top));
    const auto add = [&](float* to, const float* from) { store(to, fma(load(from), young, load(to) * old)); };
    for (i64 d = 0; d < dim; d += kLanes) add(whole.o + m * dim + d, part.o + m * dim + d);
    add(whole.l + m * kLanes, part.l + m * kLanes);
    whole.m[m] = top;
  }
}

// Number `index` of the states that the prefix left, from the task's first row on.
static StateView state_of(const Prefix& p, i64 index, i64 dim) {
  const StateView all = state_at(p.states + index * state_floats(p.rows, dim), p.rows, dim);
  return {all.o + p.first * dim, all.l + p.first * kLanes, all.m + p.first};
}

// The batch row of a task's row.
INLINE i64 token(const Batch& b, const Task& t, i64 row) {
  return t.tokens ? t.tokens[row] : b.cu_q[t.seq] + t.first_row + row;
}

// The state's sums to rows of out and lse; a sink joins the denominator here.
template <class Tq>
static void finish(const Attention& a, const Task& t, StateView state) {
  const i64 group = a.q_heads / a.kv_heads;
  for (i64 m = 0; m < t.num_rows * group; ++m) {
    const i64 head = t.kv_head * group + m % group;
    const i64 at = token(*a.batch, t, m / group) * a.q_heads + head;
    const float sink = a.sinks ? a.sinks[head] * kLog2E : -kInfinity;
    const float sum = sum_lanes(load(state.l + m * kLanes));
    float share = 0, lse = -kInfinity;
    if (sum != 0 || sink != -kInfinity) {
      const float top = state.m[m] > sink ? state.m[m] : sink;
      const float scaled = exp2(state.m[m] - top), total = sum * scaled + exp2(sink - top);
      share = scaled / total;
      lse = top * kLn2 + __builtin_logf(total);
    }
    Tq* const out = (Tq*)a.out + at * a.dim;
    for (i64 d = 0; d < a.dim; d += kLanes) store(out + d, load(state.o + m * a.dim + d) * share);
    a.lse[at] = lse;
  }
}

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }

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
  const i64 context = a.batch->seq_lens[t.seq] - (a.batch->cu_q[t.seq + 1] - a.batch->cu_q[t.seq]);
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

  Attend(const Attention& a, const Task& t, char* scratch) : a(a), t(t), memory{scratch} {}

  bool run() {
    __builtin_memset(nothing, 0, dim * sizeof(Tkv));
    __builtin_memset(weights, 0, kBlockRows * kTileKeys * sizeof(Operand));
    pack_queries();
    const StateView sum = state_at(t.partial ? t.partial : whole, rows, dim), next = state_at(part, rows, dim);
    clear(sum, rows, dim);
    for (i64 s = 0; s < t.prefix.num_closed; ++s) fold(sum, state_of(t.prefix, s, dim), rows, dim);
    for (i64 s = 0; s < t.num_segments; ++s) {
      clear(next, rows, dim);
      if (s == 0 && t.prefix.open) fold(next, state_of(t.prefix, t.prefix.num_closed, dim), rows, dim);
      if (!segment(t.first_segment + s, next)) return false;
      fold(sum, next, rows, dim);
    }
    if (!t.partial) finish<Tq>(a, t, sum);
    return true;
  }

  void pack_queries() {
    for (i64 r = 0; r < t.num_rows; ++r)
      for (i64 g = 0; g < group; ++g) {
        const Tq* from = (const Tq*)a.q + token(*a.batch, t, r) * a.q_row;
        from += (t.kv_head * group + g) * a.q_head;
        Operand* to = queries + (r * group + g) * dim;
        copy_row(from, to, dim);
      }
    __builtin_memset(queries + rows * dim, 0, (padded - rows) * dim * sizeof(Operand));
  }

  bool segment(i64 index, StateView state) {
    i64 tile = index * kSegmentKeys, end = tile + kSegmentKeys;
    if (tile < t.first_key) tile = t.first_key / kTileKeys * kTileKeys;
    if (end > t.last_key) end = t.last_key;
    if (tile < end && !locate(tile)) return false;
    for (; tile < end; tile += kTileKeys) {
      Product::template pack_keys<Tkv>(key_rows, dim, widened, keys);
      Product::template pack_values<Tkv>(value_rows, dim, values);
      if (tile + kTileKeys < end && !locate(tile + kTileKeys)) return false;
      const bool masked = look(tile);
      for (i64 block = 0; block < rows; block += kBlockRows) {
        const i64 count = least(rows - block, kBlockRows);
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

  // Where the keys and values of a tile lie, fetched ahead of their use: they are strewn over blocks, and the processor
  // does not guess the next one. Keys outside of the task's range are not read: zeros stand in for them, unseen.
  bool locate(i64 tile) {
    const Batch& b = *a.batch;
    const std::int32_t* table = b.block_table + t.seq * b.table_width;
    const i64 key_stride = a.kv_heads * dim;
    for (i64 j = 0; j < kTileKeys;) {
      const i64 key = tile + j;
      if (key < t.first_key || key >= t.last_key) {
        key_rows[j] = value_rows[j] = nothing;
        ++j;
        continue;
      }
      const i64 block = table[key / b.block_size], offset = key % b.block_size;
      if (block < 0 || block >= a.num_blocks) return false;
      i64 at = ((block * b.block_size + offset) * a.kv_heads + t.kv_head) * dim;
      const i64 last = least(least(j + b.block_size - offset, kTileKeys), t.last_key - tile);
      for (; j < last; ++j, at += key_stride) {
        key_rows[j] = (const Tkv*)a.k + at;
        value_rows[j] = (const Tkv*)a.v + at;
        for (i64 byte = 0; byte < dim * (i64)sizeof(Tkv); byte += 64) {
          __builtin_prefetch((const char*)key_rows[j] + byte);
          __builtin_prefetch((const char*)value_rows[j] + byte);
        }
      }
    }
    return true;
  }

  // What each row sees of a tile, and whether any sees less than all of it.
  bool look(i64 tile) {
    if (t.tokens) return false;
    std::uint64_t all = ~0ull;
    for (i64 r = 0; r < t.num_rows; ++r) {
      const std::uint64_t bits = visible(*a.batch, t, context, t.first_row + r, tile);
      for (i64 g = 0; g < group; ++g) seen[r * group + g] = bits;
      all &= bits;
    }
    return all != ~0ull;
  }

  // Row i of the block, row m of the task: scores become weights relative to 2^m. What m is does not matter as long as
  // nothing overflows, so it moves only when a score exceeds it by kSlack: weights reach 2^8, their sums 2^17.
  template <bool Masked>
  inline __attribute__((always_inline)) void soften(i64 i, i64 m, StateView state) {
    constexpr int kVectors = kTileKeys / kLanes;
    constexpr float kSlack = 8;
    Operand* const out = weights + i * kTileKeys;
    const std::uint64_t bits = Masked ? seen[m] : ~0ull;
    if (Masked && bits == 0) {
      for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, f32x16{});
      return;
    }
    f32x16 s[kVectors], highest = splat(-kInfinity);
    for (int v = 0; v < kVectors; ++v) {
      s[v] = load(scores + i * kTileKeys + v * kLanes);
      if (a.softcap == 0)
        s[v] *= (float)a.scale * kLog2E;
      else
        s[v] = tanh(s[v] * ((float)a.scale / (float)a.softcap)) * ((float)a.softcap * kLog2E);
      if (Masked) s[v] = keep(s[v], (bits >> (v * kLanes)) & 0xffff);
      highest = max(highest, s[v]);
    }
    float top = state.m[m];
    float* const l = state.l + m * kLanes;
    if (any_above(highest, top + kSlack)) {
      const float found = max_lanes(highest);
      if (top != -kInfinity) {
        const f32x16 shrink = exp2(splat(top - found));
        float* const o = state.o + m * dim;
        for (i64 d = 0; d < dim; d += kLanes) store(o + d, load(o + d) * shrink);
        store(l, load(l) * shrink);
      }
      state.m[m] = top = found;
    }
    f32x16 total = load(l);
    for (int v = 0; v < kVectors; ++v) {
      const f32x16 p = exp2(s[v] - top);
      total += p;
      store(out + v * kLanes, p);
    }
    store(l, total);
  }
};

#if HAS_AMX
// Tiles multiply pairs of bf16, 32 to a row; everything else is for the vectors.
static bool tiles_serve(const Attention& a) {
  return a.dtype == kBfloat16 && a.cache_dtype == kBfloat16 && a.dim % 32 == 0;
}
#endif

static bool attend(const Attention& a, const Task& t, char* scratch) {
#if HAS_AMX
  if (tiles_serve(a)) return Attend<TileProduct, bf16, bf16>(a, t, scratch).run();
#endif
  bool ok = false;
  with_dtype(a.dtype, [&](auto q) {
    with_dtype(a.cache_dtype, [&](auto kv) {
      ok = Attend<VectorProduct, decltype(q), decltype(kv)>(a, t, scratch).run();
    });
  });
  return ok;
}

static void merge(const Attention& a, const Task& t) {
  const i64 rows = t.num_rows * (a.q_heads / a.kv_heads);
  const StateView whole = state_at(t.partial, rows, a.dim);
  for (i64 s = 1; s < t.num_segments; ++s)
    fold(whole, state_at(t.partial + s * state_floats(rows, a.dim), rows, a.dim), rows, a.dim);
  with_dtype(a.dtype, [&](auto q) { finish<decltype(q)>(a, t, whole); });
}

static void enter([[maybe_unused]] const Attention& a) {
#if HAS_AMX
  if (tiles_serve(a)) TileProduct::enter();
#endif
}

static void leave([[maybe_unused]] const Attention& a) {
#if HAS_AMX
  if (tiles_serve(a)) TileProduct::leave();
#endif
}
