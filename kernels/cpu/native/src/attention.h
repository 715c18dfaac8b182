// Attention of one task: online softmax (Milakov and Gimelshein 2018; Dao et al. 2022, algorithm 1) over tiles of 64
// keys, segment by segment.
//
//     segment = 512 keys of the sequence, wherever the rows begin      state = (o, l, m), merged in the segments' order
//
// A lane is a row, from the scores to the state: nothing is ever summed across lanes. Tiles and segments lie at
// multiples of their size and a masked key adds an exact zero. So the bits of a row follow from its own query, keys and
// mask, not from the rows it shares a task with, nor from who computes which segment. Nor, therefore, from whether a
// prefix was summed for a group of sequences at once: its rows go on from that state.

INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }

static void clear(StateView state, i64 rows, i64 dim) {
  const i64 n = padded_rows(rows);
  for (i64 i = 0; i < n * (dim + 1); i += kLanes) store(state.o + i, f32x16{});  // l lies behind o
  for (i64 i = 0; i < n; i += kLanes) store(state.m + i, splat(-kInfinity));
}

// What exponents are relative to: m, or anything where nothing was seen yet.
INLINE f32x16 base_of(f32x16 m) { return m == -kInfinity ? f32x16{} : m; }

// whole += part, two sums over disjoint keys.
static void fold(StateView whole, StateView part, i64 rows, i64 dim) {
  for (i64 block = 0; block < rows; block += kBlockRows) {
    const f32x16 before = load(whole.m + block), after = load(part.m + block), top = max(before, after);
    const f32x16 old = exp2(before - base_of(top)), young = exp2(after - base_of(top));
    const auto add = [&](float* to, const float* from) { store(to, fma(load(from), young, load(to) * old)); };
    for (i64 d = 0; d < dim; ++d) add(whole.o + block * dim + d * kLanes, part.o + block * dim + d * kLanes);
    add(whole.l + block, part.l + block);
    store(whole.m + block, top);
  }
}

// The task's rows of state number `index` that the prefix left.
static void take_over(const Prefix& p, i64 index, StateView to, i64 rows, i64 dim) {
  const StateView all = state_at(p.states + index * state_floats(p.rows, dim), p.rows, dim);
  clear(to, rows, dim);
  for (i64 row = 0; row < rows;) {
    const i64 from = p.first + row, lane = from % kLanes, at = row % kLanes;
    const i64 count = least(rows - row, kLanes - (lane > at ? lane : at));
    const float* o = all.o + (from - lane) * dim + lane;
    float* const mine = to.o + (row - at) * dim + at;
    for (i64 d = 0; d < dim; ++d)
      for (i64 i = 0; i < count; ++i) mine[d * kLanes + i] = o[d * kLanes + i];
    for (i64 i = 0; i < count; ++i, ++row) {
      to.l[row] = all.l[p.first + row];
      to.m[row] = all.m[p.first + row];
    }
  }
}

// The batch row of a task's row.
INLINE i64 token(const Batch& b, const Task& t, i64 row) {
  return t.tokens ? t.tokens[row] : b.cu_q[t.seq] + t.first_row + row;
}

// The state's sums to rows of out and lse; a sink joins the denominator here, and a scale that all values of a head
// have.
template <class Tq>
static void finish(const Attention& a, const Task& t, StateView state) {
  const i64 group = a.q_heads / a.kv_heads, rows = t.num_rows * group;
  const float value_scale = a.format == kKvFp8 ? ((const float*)a.v_scale)[t.kv_head] : 1.0f;
  for (i64 block = 0; block < rows; block += kBlockRows) {
    const i64 count = least(rows - block, kBlockRows);
    i64 at[kBlockRows] = {};
    float sinks[kBlockRows] = {}, totals[kBlockRows], tops[kBlockRows];
    for (i64 i = 0; i < count; ++i) {
      const i64 head = t.kv_head * group + (block + i) % group;
      at[i] = token(*a.batch, t, (block + i) / group) * a.q_heads + head;
      sinks[i] = a.sinks ? a.sinks[head] * kLog2E : -kInfinity;
    }
    const f32x16 sink = load(sinks), m = load(state.m + block), top = max(m, sink);
    const f32x16 scaled = exp2(m - base_of(top)), total = load(state.l + block) * scaled + exp2(sink - base_of(top));
    const f32x16 share = total == 0 ? f32x16{} : value_scale * (scaled / total);
    store(totals, total);
    store(tops, top);
    for (i64 i = 0; i < count; ++i)
      a.lse[at[i]] = totals[i] == 0 ? -kInfinity : tops[i] * kLn2 + __builtin_logf(totals[i]);
    for (i64 d = 0; d < a.dim; d += kLanes) {
      float columns[kLanes * kLanes], turned[kLanes * kLanes];
      const void* rows_of[kLanes];
      for (i64 i = 0; i < kLanes; ++i) {
        store(columns + i * kLanes, load(state.o + block * a.dim + (d + i) * kLanes) * share);
        rows_of[i] = columns + i * kLanes;
      }
      transpose(rows_of, kLanes, (std::uint32_t*)turned, kLanes);
      for (i64 i = 0; i < count; ++i) store((Tq*)a.out + at[i] * a.dim + d, load(turned + i * kLanes));
    }
  }
}

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

INLINE u32x16 load_words(const std::uint32_t* p) {
  u32x16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

INLINE bool any(i32x16 lanes) {
#if HAS_AVX512
  return _mm512_movepi32_mask((__m512i)lanes) != 0;
#else
  std::int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= lanes[i];
  return found != 0;
#endif
}

template <class Product>
struct Attend {
  using Operand = typename Product::Operand;

  const Attention& a;
  const Task& t;
  const i64 dim = a.dim, wide = padded_dim(dim), group = a.q_heads / a.kv_heads;
  const i64 rows = t.num_rows * group, padded = padded_rows(rows);
  const i64 context = a.batch->seq_lens[t.seq] - (a.batch->cu_q[t.seq + 1] - a.batch->cu_q[t.seq]);
  Workspace memory;
  Operand* const keys = memory.take<Operand>(kTileKeys * wide);
  Operand* const values = memory.take<Operand>(kTileKeys * dim);
  Operand* const between = memory.take<Operand>(kTileKeys * dim);
  float* const scores = memory.take<float>(2 * kTileKeys * kBlockRows);
  Operand* const weights = memory.take<Operand>(2 * kTileKeys * kBlockRows);
  Operand* const queries = memory.take<Operand>(padded * wide);
  Operand* const staged = memory.take<Operand>(kBlockRows * wide);
  float* const whole = memory.take<float>(state_floats(rows, dim));
  float* const part = memory.take<float>(state_floats(rows, dim));
  std::uint32_t* const seen = memory.take<std::uint32_t>(2 * padded);  // of the tile's halves: [padded] each
  const void** const key_rows = memory.take<const void*>(kTileKeys);
  const void** const value_rows = memory.take<const void*>(kTileKeys);
  fp16* const key_scales = memory.take<fp16>(kTileKeys);
  fp16* const value_scales = memory.take<fp16>(kTileKeys);
  float* const score_factors = memory.take<float>(kTileKeys);   // a key's scale, and that of all scores
  float* const weight_factors = memory.take<float>(kTileKeys);  // a value's
  char* const nothing = memory.take<char>(4 * dim);

  Attend(const Attention& a, const Task& t, char* scratch) : a(a), t(t), memory{scratch} {}

  bool run() {
    __builtin_memset(nothing, 0, 4 * dim);
    if (wide > dim) __builtin_memset(keys, 0, kTileKeys * wide * sizeof(Operand));
    for (i64 j = 0; j < kTileKeys; ++j) score_factors[j] = score_scale();
    for (i64 m = 0; m < 2 * padded; ++m) seen[m] = 0;
    pack_queries();
    const StateView sum = state_at(t.partial ? t.partial : whole, rows, dim), next = state_at(part, rows, dim);
    clear(sum, rows, dim);
    for (i64 s = 0; s < t.prefix.num_closed; ++s) {
      take_over(t.prefix, s, next, rows, dim);
      fold(sum, next, rows, dim);
    }
    for (i64 s = 0; s < t.num_segments; ++s) {
      const bool alone = s == 0 && t.prefix.num_closed == 0;
      const StateView state = alone ? sum : next;
      if (s == 0 && t.prefix.open)
        take_over(t.prefix, t.prefix.num_closed, state, rows, dim);
      else if (!alone)
        clear(state, rows, dim);
      if (!segment(t.first_segment + s, state)) return false;
      if (!alone) fold(sum, state, rows, dim);
    }
    if (!t.partial) with_dtype(a.dtype, [&](auto q) { finish<decltype(q)>(a, t, sum); });
    return true;
  }

  // To base 2, but for what tokens have of their own; with a soft cap, of what the tangent is taken of.
  float score_scale() const {
    const float head = a.format == kKvFp8 ? ((const float*)a.k_scale)[t.kv_head] : 1.0f;
    return (float)a.scale * head * (a.softcap == 0 ? kLog2E : 1.0f / (float)a.softcap);
  }

  // Turned as the keys are, where they are.
  void pack_queries() {
    for (i64 block = 0; block < rows; block += kBlockRows) {
      __builtin_memset(staged, 0, kBlockRows * wide * sizeof(Operand));
      for (i64 i = 0; i < least(rows - block, kBlockRows); ++i) {
        const i64 at = token(*a.batch, t, (block + i) / group) * a.q_row;
        const i64 head = (t.kv_head * group + (block + i) % group) * a.q_head;
        with_dtype(a.dtype, [&](auto q) {
          const auto* const from = (const decltype(q)*)a.q + at + head;
          if (a.format != kKvInt4) return copy_row(from, staged + i * wide, dim);
          copy_row(from, part, dim);
          turn(part, dim);
          copy_row(part, staged + i * wide, dim);
        });
      }
      Product::pack_queries(staged, wide, queries + block * wide);
    }
  }

  // While a block is softened, the scores of the one behind it are made and the one before it is summed: tiles and
  // vectors work at the same time, and no tile is loaded from what was stored just now.
  bool segment(i64 index, StateView state) {
    i64 tile = index * kSegmentKeys, end = tile + kSegmentKeys;
    if (tile < t.first_key) tile = t.first_key / kTileKeys * kTileKeys;
    if (end > t.last_key) end = t.last_key;
    if (tile < end && !locate(tile)) return false;
    for (; tile < end; tile += kTileKeys) {
      const KeysOf<Operand> lie = read_keys(tile);
      Product::values(a.format, value_rows, dim, between, values);
      if (has_token_scales(a.format)) read_scales();
      if (tile + kTileKeys < end && !locate(tile + kTileKeys)) return false;
      const bool masked = look(tile);
      const auto score = [&](i64 block) __attribute__((always_inline)) {
        Product::scores(wide, lie, queries + block * wide, scores_of(block));
      };
      const auto add = [&](i64 block) __attribute__((always_inline)) {
        Product::add_values(dim, values, weights_of(block), state.o + block * dim);
      };
      score(0);
      for (i64 block = 0; block < rows; block += kBlockRows) {
        if (block + kBlockRows < rows) score(block + kBlockRows);
        if (has_token_scales(a.format))
          masked ? soften<true, true>(block, state) : soften<false, true>(block, state);
        else
          masked ? soften<true, false>(block, state) : soften<false, false>(block, state);
        if (block > 0) add(block - kBlockRows);
      }
      add(padded - kBlockRows);
    }
    return true;
  }

  float* scores_of(i64 block) const { return scores + block % (2 * kBlockRows) * kTileKeys; }
  Operand* weights_of(i64 block) const { return weights + block % (2 * kBlockRows) * kTileKeys; }

  // In the pages where they lie as the product wants them, else decoded.
  KeysOf<Operand> read_keys(i64 tile) {
    const bool plain = a.format == (sizeof(Operand) == 4 ? kKvFloat32 : kKvBfloat16);
    if (plain && wide == dim && a.batch->block_size % 16 == 0 && tile >= t.first_key &&
        tile + kTileKeys <= t.last_key) {
      KeysOf<Operand> there = {{}, a.kv_heads * dim};
      for (int i = 0; i < 4; ++i) there.sixteen[i] = (const Operand*)key_rows[16 * i];
      return there;
    }
    Product::keys(a.format, key_rows, dim, wide, keys);
    return {{keys, keys + 16 * wide, keys + 32 * wide, keys + 48 * wide}, wide};
  }

  // Where the keys and values of a tile lie. Keys outside of the task's range are not read: zeros stand in for them,
  // unseen.
  bool locate(i64 tile) {
    const Batch& b = *a.batch;
    const std::int32_t* table = b.block_table + t.seq * b.table_width;
    const i64 bytes = row_bytes(a.format, dim), step = a.kv_heads * bytes;
    for (i64 j = 0; j < kTileKeys;) {
      const i64 key = tile + j;
      if (key < t.first_key || key >= t.last_key) {
        key_rows[j] = value_rows[j] = nothing;
        key_scales[j] = value_scales[j] = fp16{0};
        ++j;
        continue;
      }
      const i64 block = table[key / b.block_size], offset = key % b.block_size;
      if (block < 0 || block >= a.num_blocks) return false;
      const i64 first = (block * b.block_size + offset) * a.kv_heads + t.kv_head;
      const i64 count = least(least(b.block_size - offset, kTileKeys - j), t.last_key - key);
      const char *k = (const char*)a.k + first * bytes, *v = (const char*)a.v + first * bytes;
      for (i64 i = j; i < j + count; ++i, k += step, v += step) {
        key_rows[i] = k;
        value_rows[i] = v;
      }
      if (has_token_scales(a.format))
        for (i64 i = 0; i < count; ++i) {
          key_scales[j + i] = ((const fp16*)a.k_scale)[first + i * a.kv_heads];
          value_scales[j + i] = ((const fp16*)a.v_scale)[first + i * a.kv_heads];
        }
      j += count;
    }
    return true;
  }

  // Asks for some keys and values of the tile that was located last: they are strewn over blocks, and the processor
  // does not guess the next one. A few at a time while others are softened, because it waits for 16 lines at most.
  __attribute__((noinline)) void fetch(i64 first, i64 count) const {
    const i64 bytes = row_bytes(a.format, dim);
    for (i64 j = first; j < first + count; ++j)
      for (i64 byte = 0; byte < bytes; byte += 64) {
        __builtin_prefetch((const char*)key_rows[j] + byte);
        __builtin_prefetch((const char*)value_rows[j] + byte);
      }
  }

  void read_scales() {
    for (i64 j = 0; j < kTileKeys; j += kLanes) {
      store(score_factors + j, load(key_scales + j) * score_scale());
      store(weight_factors + j, load(value_scales + j));
    }
  }

  // What each row sees of a tile, and whether any sees less than all of it. Lanes without a row see nothing.
  bool look(i64 tile) {
    const Batch& b = *a.batch;
    const bool inside = tile >= t.first_key && tile + kTileKeys <= t.last_key;
    if (t.tokens || (inside && !b.window && tile + kTileKeys <= context)) return false;
    std::uint64_t all = ~0ull;
    for (i64 r = 0; r < t.num_rows; ++r) {
      const std::uint64_t bits = visible(b, t, context, t.first_row + r, tile);
      for (i64 m = r * group; m < (r + 1) * group; ++m) {
        seen[m] = (std::uint32_t)bits;
        seen[padded + m] = (std::uint32_t)(bits >> 32);
      }
      all &= bits;
    }
    return all != ~0ull;
  }

  // A block's scores become weights relative to 2^m. What m is does not matter as long as nothing overflows, so it is
  // what a row's first scores are at most, and moves only when the weights of a tile sum to more than kMost.
  template <bool Masked, bool Scaled>
  __attribute__((noinline)) void soften(i64 block, StateView state) {
    constexpr float kMost = 4096;
    if (a.softcap != 0) cap(scores_of(block));
    f32x16 top = load(state.m + block);
    if (const auto unseen = top == -kInfinity; any(unseen))
      top = raise(block, state, unseen ? highest<Masked, Scaled>(block) : top);
    f32x16 sum = weigh<Masked, Scaled>(block, top, block == 0);
    if (const auto large = sum > kMost; any(large)) {
      top = raise(block, state, large ? highest<Masked, Scaled>(block) : top);
      sum = weigh<Masked, Scaled>(block, top, false);
    }
    store(state.l + block, load(state.l + block) + sum);
  }

  // A block's scores to base 2, by key, less m; -infinity where a row does not see the key.
  template <bool Masked, bool Scaled>
  __attribute__((always_inline)) auto exponents(i64 block, f32x16 m) const {
    const float *const s = scores_of(block), *const factors = score_factors;
    const f32x16 constant = splat(a.softcap == 0 ? score_scale() : 1.0f), minus = -m;
    const bool per_key = Scaled && a.softcap == 0;
    const u32x16 low = Masked ? load_words(seen + block) : u32x16{};
    const u32x16 high = Masked ? load_words(seen + padded + block) : u32x16{};
    return [=](i64 j) __attribute__((always_inline)) {
      const f32x16 x = fma(load(s + j * kLanes), per_key ? splat(factors[j]) : constant, minus);
      if (!Masked) return x;
      return ((j < 32 ? low : high) & (1u << j % 32)) == 0 ? splat(-kInfinity) : x;
    };
  }

  static constexpr int kChains = 4;  // of additions, which wait for each other

  template <bool Masked, bool Scaled>
  __attribute__((noinline)) f32x16 highest(i64 block) const {
    const auto exponent = exponents<Masked, Scaled>(block, f32x16{});
    f32x16 most[kChains];
    for (int c = 0; c < kChains; ++c) most[c] = splat(-kInfinity);
    for (i64 j = 0; j < kTileKeys; j += kChains)
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) most[c] = max(most[c], exponent(j + c));
    return max(max(most[0], most[1]), max(most[2], most[3]));
  }

  // Writes a block's weights and returns their sums.
  template <bool Masked, bool Scaled>
  __attribute__((always_inline)) f32x16 weigh(i64 block, f32x16 m, bool fetching) const {
    const auto exponent = exponents<Masked, Scaled>(block, base_of(m));
    Operand* const w = weights_of(block);
    f32x16 sum[kChains] = {};
    for (i64 j = 0; j < kTileKeys; j += kChains) {
      if (fetching) fetch(j, kChains);
      f32x16 p[kChains];
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        p[c] = Product::power(exponent(j + c));
        sum[c] += p[c];
        if (Scaled) p[c] *= splat(weight_factors[j + c]);
      }
      Product::put(w, j, p[0], p[1]);
      Product::put(w, j + 2, p[2], p[3]);
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // Moves the rows of a block whose m is another than before.
  f32x16 raise(i64 block, StateView state, f32x16 top) {
    const f32x16 before = load(state.m + block);
    const f32x16 shrink = exp2(before == top ? f32x16{} : before - top);
    float* const o = state.o + block * dim;
    for (i64 d = 0; d < dim; ++d) store(o + d * kLanes, load(o + d * kLanes) * shrink);
    store(state.l + block, load(state.l + block) * shrink);
    store(state.m + block, top);
    return top;
  }

  void cap(float* s) const {
    for (i64 j = 0; j < kTileKeys; ++j)
      store(s + j * kLanes, tanh(load(s + j * kLanes) * score_factors[j]) * ((float)a.softcap * kLog2E));
  }
};

#if HAS_AMX
// Tiles multiply pairs of bf16; everything else is for the vectors.
static bool tiles_serve(const Attention& a) { return a.dtype == kBfloat16 && a.format != kKvFloat32; }
#endif

static bool attend(const Attention& a, const Task& t, char* scratch) {
#if HAS_AMX
  if (tiles_serve(a)) return Attend<TileProduct>(a, t, scratch).run();
#endif
  return Attend<VectorProduct>(a, t, scratch).run();
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
  if (tiles_serve(a)) enter_tiles();
#endif
}

static void leave([[maybe_unused]] const Attention& a) {
#if HAS_AMX
  if (tiles_serve(a)) leave_tiles();
#endif
}
