// The products of integers.h by integer tiles: 0 to 3 are sums, 4 and 5 of x, 6 and 7 of the weights.
//
//     up to 32 rows   one pass over the weights in their order, fetched some KiB ahead
//     more            for a unit of outputs, for a part of the inputs: for 32 rows: for 32 outputs: two by two tiles
//
// Two by two tiles need as many bytes per product as come from L1, twice what comes from L2. So 32 rows by a part of
// the inputs stay in L1, and the weights stream from L2, where a part of the unit stays over all rows, by loads that
// leave L1 alone (1.3 times as fast as plain ones, measured on a Sapphire Rapids core). What comes next, of the weights
// and of x, is fetched to L2 meanwhile.

constexpr i64 kTileRows = 2 * kLanes, kSumWords = 4 * kLanes * kLanes;
constexpr i64 kL1Steps = 20;  // of 64 inputs: 32 rows in 40 of the 48 KiB

INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

INLINE void load_sums(const std::int32_t* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + 512, 64);
  _tile_loadd(2, sums + 256, 64);
  _tile_loadd(3, sums + 768, 64);
}

INLINE void store_sums(std::int32_t* sums) {
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 512, 64);
  _tile_stored(2, sums + 256, 64);
  _tile_stored(3, sums + 768, 64);
  __asm__ volatile("" ::: "memory");
}

// Lines of 64 bytes to fetch, so many at each step.
struct Fetch {
  const i8* at;
  i64 lines;
};

// The share of block `index` of `count` in two columns of `steps` tiles.
INLINE Fetch share(const i8* tiles, i64 column, i64 steps, i64 index, i64 count) {
  const i64 lines = (2 * kLanes + count - 1) / count, at = index * lines * steps, height = kLanes * steps;
  if (at >= 2 * height) return {tiles, 0};
  return {tiles + at / height * column + at % height * 64, lines};
}

// Sums of 32 rows by 32 outputs that wait to be scaled and stored: among the next tile products, where the vector unit
// is idle.
template <class T>
struct Waiting {
  i64 rows = 0;
  const std::int32_t* sums;  // [2][32][16]
  const float* row_scales;
  T* out;
  i64 stride;
  f32x16 scales[2], bias[2];

  void take(const IntegerLinear& l, const Codes& x, i64 row, i64 output, const std::int32_t* from) {
    rows = x.rows - row < kTileRows ? x.rows - row : kTileRows;
    sums = from;
    row_scales = x.scales + row;
    out = (T*)l.out + row * l.outputs + output;
    stride = l.outputs;
    for (i64 c = 0; c < 2; ++c) {
      scales[c] = load(l.scales + output + c * kLanes);
      bias[c] = l.bias ? load(l.bias + output + c * kLanes) : splat(-0.0f);  // x + -0 is x, -0 too
    }
  }
};

INLINE void store_two(float* out, f32x16 a, f32x16 b) {
  store(out, a);
  store(out + kLanes, b);
}

INLINE void store_two(bf16* out, f32x16 a, f32x16 b) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}

// Two tiles of x by two of weights over some steps; meanwhile what waits is stored, and what comes is fetched.
template <class T>
__attribute__((noinline)) static void two_by_two(const i8* x, i64 x_next, const i8* w, i64 w_next, i64 steps,
                                                 Waiting<T>& waiting, const Fetch& fetch_w, const Fetch& fetch_x) {
  const f32x16 scale0 = waiting.scales[0], scale1 = waiting.scales[1], bias0 = waiting.bias[0], bias1 = waiting.bias[1];
  const std::int32_t* sums = waiting.sums;
  const float* row_scales = waiting.row_scales;
  T* out = waiting.out;
  const i64 stride = waiting.stride;
  i64 left = waiting.rows;
  const i8 *ahead_w = fetch_w.at, *ahead_x = fetch_x.at;
  const i64 lines_w = fetch_w.lines, lines_x = fetch_x.lines;
  const auto finish_one = [&]() __attribute__((always_inline)) {
    const f32x16 factor = splat(*row_scales);
    store_two(out, to_float(load_words(sums)) * factor * scale0 + bias0,
              to_float(load_words(sums + kTileRows * kLanes)) * factor * scale1 + bias1);
    ++row_scales;
    sums += kLanes;
    out += stride;
  };
  constexpr i64 kAmong = 4;  // rows stored at a step: eight steps are fewer than a tile product's usual ones
  for (i64 s = 0; s < steps; ++s, x += kStepBytes, w += kStepBytes) {
    _tile_loadd(4, x, 64);
    _tile_stream_loadd(6, w, 64);
    _tile_dpbssd(0, 4, 6);
    _tile_stream_loadd(7, w + w_next, 64);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, x + x_next, 64);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    if (left >= kAmong) {
      for (i64 i = 0; i < kAmong; ++i) finish_one();
      left -= kAmong;
    }
    for (i64 i = 0; i < lines_w; ++i, ahead_w += 64) __builtin_prefetch(ahead_w, 0, 2);
    for (i64 i = 0; i < lines_x; ++i, ahead_x += 64) __builtin_prefetch(ahead_x, 0, 2);
  }
  for (; left > 0; --left) finish_one();
  waiting.rows = 0;
}

template <class T>
static void flush(Waiting<T>& waiting) {
  two_by_two<T>(nullptr, 0, nullptr, 0, 0, waiting, {}, {});
}

// The same at the edges, by one tile of either.
template <int Rows, int Columns>
__attribute__((noinline)) static void edge(const i8* x, i64 x_next, const i8* w, i64 w_next, i64 steps) {
  for (i64 s = 0; s < steps; ++s, x += kStepBytes, w += kStepBytes) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (Columns > 1) {
      _tile_loadd(7, w + w_next, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (Rows > 1) {
      _tile_loadd(5, x + x_next, 64);
      _tile_dpbssd(2, 5, 6);
    }
  }
}

// How the work is cut: row blocks by units of outputs, in pairs of tiles, by parts of the inputs.
struct IntegerCut {
  i64 pairs, units, parts, blocks, height;

  IntegerCut(const IntegerLinear& l, const Codes& x, i64 threads) {
    pairs = (l.outputs + kTileRows - 1) / kTileRows;
    parts = (x.steps + kL1Steps - 1) / kL1Steps;
    // Every thread gets several units, so that none waits long for another; with many rows fewer and wider ones, so
    // that x is read less often. 16 pairs by a part of the inputs are 640 KiB of a 2 MiB L2.
    constexpr i64 kWidest = 16;
    const i64 turn = (x.rows < 256 ? 4 : 2) * threads;
    const i64 wanted = ((pairs + kWidest - 1) / kWidest + turn - 1) / turn * turn;
    units = wanted < pairs ? wanted : pairs;
    // Of several parts the sums of all but the last are kept, in 1 MiB of L2.
    const i64 tall = parts > 1 ? 256 / widest() * kTileRows : x.padded() + kTileRows;
    blocks = (x.rows + tall - 1) / tall;
    height = ((x.rows + blocks - 1) / blocks + kTileRows - 1) / kTileRows * kTileRows;
  }
  i64 widest() const { return (pairs + units - 1) / units; }
  i64 first_pair(i64 piece) const { return piece % units * pairs / units; }
  i64 last_pair(i64 piece) const { return (piece % units + 1) * pairs / units; }
  i64 sums() const { return (parts > 1 ? height / kTileRows * widest() : 2) * kSumWords; }
};

// Piece `piece`; `next` is the one after it, or -1.
template <class T>
static void tile_piece(const IntegerLinear& l, const Codes& x, const IntegerCut& c, i64 piece, i64 next,
                       std::int32_t* sums) {
  const i64 column = x.steps * kStepBytes, below = x.steps * x.step(), tiles = (l.outputs + kLanes - 1) / kLanes;
  const i64 first = c.first_pair(piece), last = c.last_pair(piece);
  const i64 top = piece / c.units * c.height, end = top + c.height < l.rows ? top + c.height : l.rows;
  const i64 row_pairs = (end - top + kTileRows - 1) / kTileRows;
  Waiting<T> waiting;
  std::int32_t* into = sums;
  for (i64 part = 0; part < c.parts; ++part) {
    const i64 from = part * x.steps / c.parts, to = (part + 1) * x.steps / c.parts;
    if (c.parts > 1) into = sums - kSumWords;
    for (i64 row = top; row < end; row += kTileRows) {
      const i8* const codes = x.row(row) + from * x.step();
      for (i64 pair = first; pair < last; ++pair) {
        if (c.parts > 1)
          into += kSumWords;
        else
          into = into == sums ? sums + kSumWords : sums;
        if (part > 0)
          load_sums(into);
        else
          clear_sums();
        const i8* const w = l.weight + 2 * pair * column + from * kStepBytes;
        const bool two_rows = end - row > kLanes, two_columns = 2 * pair + 1 < tiles;
        if (two_rows && two_columns) {
          // Of the same pair in what comes next, the share of these rows; of the next rows, that of this pair.
          const i64 row_pair = (row - top) / kTileRows, fetched = c.first_pair(next) + pair - first;
          Fetch fetch_w{w, 0}, fetch_x{codes, 0};
          if (part + 1 < c.parts)
            fetch_w = share(w + (to - from) * kStepBytes, column, to - from, row_pair, row_pairs);
          else if (next >= 0 && fetched < c.pairs)
            fetch_w = share(l.weight + 2 * fetched * column, column, x.steps / c.parts, row_pair, row_pairs);
          if (row + kTileRows < end) fetch_x = share(codes + 2 * below, below, to - from, pair - first, last - first);
          two_by_two<T>(codes, below, w, column, to - from, waiting, fetch_w, fetch_x);
        } else {
          flush(waiting);
          if (two_columns)
            edge<1, 2>(codes, 0, w, column, to - from);
          else if (two_rows)
            edge<2, 1>(codes, below, w, 0, to - from);
          else
            edge<1, 1>(codes, 0, w, 0, to - from);
        }
        store_sums(into);
        if (part < c.parts - 1) continue;
        if ((2 * pair + 2) * kLanes <= l.outputs) {
          waiting.take(l, x, row, 2 * pair * kLanes, into);
        } else {
          for (i64 r = row; r < end && r < row + kTileRows; ++r)
            for (i64 t = 2 * pair; t < tiles; ++t)
              finish<T>(l, x, r, t * kLanes, load_words(into + (t % 2 * kTileRows + r - row) * kLanes));
        }
      }
    }
  }
  flush(waiting);
}

static i64 many_rows(const IntegerLinear& l, const Codes& x, Worker& w) {
  const IntegerCut c(l, x, w.count);
  const i64 pieces = c.units * c.blocks;
  std::int32_t* const sums = (std::int32_t*)w.scratch(c.sums() * 4);
  for (Worker::Range r; w.next(r, l.rows, 4);) make_codes(l, x, r.first, r.last);
  w.barrier();
  if (!sums) return kOutOfMemory;
  enter_tiles();
  Worker::Range now, next;
  bool more = w.next(now, pieces, 1, 1);
  while (more) {
    more = w.next(next, pieces, 1, 1);
    with_dtype(l.out_dtype, [&](auto t) { tile_piece<decltype(t)>(l, x, c, now.first, more ? next.first : -1, sums); });
    now = next;
  }
  leave_tiles();
  return kDone;
}

// Up to 16 rows by four tiles of outputs, or up to 32 by two; or by one. `next` is what comes after them.
template <int Rows, int Columns>
INLINE void few_steps(const IntegerLinear& l, const Codes& x, i64 tile, std::int32_t* sums, const i8* next) {
  const i64 column = x.steps * kStepBytes, below = x.steps * x.step();
  const i8* codes = x.tiles;
  const i8* w = l.weight + tile * column;
  const i8* const end = w + column;
  const i8* ahead = w + 2048;  // of each column; fetched to L2, where it is in time
  clear_sums();
  for (; w < end; codes += x.step(), w += kStepBytes, ahead += kStepBytes) {
    if (ahead == end) ahead = next;
    for (i64 c = 0; c < Columns; ++c)
      for (i64 i = 0; i < kStepBytes; i += 64) __builtin_prefetch(ahead + c * column + i, 0, 2);
    _tile_loadd(4, codes, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (Columns > 1) {
      _tile_loadd(7, w + column, 64);
      _tile_dpbssd(1, 4, 7);
    }
    if constexpr (Columns > 2) {
      _tile_loadd(6, w + 2 * column, 64);
      _tile_dpbssd(2, 4, 6);
      _tile_loadd(7, w + 3 * column, 64);
      _tile_dpbssd(3, 4, 7);
    }
    if constexpr (Rows > 1) {
      _tile_loadd(5, codes + below, 64);
      _tile_dpbssd(2, 5, 6);
      if constexpr (Columns > 1) _tile_dpbssd(3, 5, 7);
    }
  }
  store_sums(sums);
  with_dtype(l.out_dtype, [&](auto t) {
    for (i64 c = 0; c < Columns; ++c) {
      const i64 output = (tile + c) * kLanes;
      // Sums are [2][32][16]: of four tiles of outputs, the third is where the second sixteen rows of the first are.
      const std::int32_t* from = sums + (c % 2 * 2 + c / 2) * kLanes * kLanes;
      for (i64 r = 0; r < l.rows; ++r) finish<decltype(t)>(l, x, r, output, load_words(from + r * kLanes));
    }
  });
}

static i64 few_rows(const IntegerLinear& l, const Codes& x, std::int32_t* sums, Worker& w) {
  const i64 tiles = (l.outputs + kLanes - 1) / kLanes, width = l.rows <= kLanes ? 4 : 2;
  const i64 units = (tiles + width - 1) / width;
  enter_tiles(x.height);
  Worker::Range now, next;
  bool more = w.next(now, units, 1, 1);
  while (more) {
    more = w.next(next, units, 1, 1);
    const i64 tile = in_stretches(now.first, units, w.count) * width,
              last = tile + width < tiles ? tile + width : tiles;
    const i8* const after =
        l.weight + (more ? in_stretches(next.first, units, w.count) : 0) * width * x.steps * kStepBytes;
    if (last - tile < width)
      for (i64 t = tile; t < last; ++t)
        l.rows <= kLanes ? few_steps<1, 1>(l, x, t, sums, after) : few_steps<2, 1>(l, x, t, sums, after);
    else if (width == 4)
      few_steps<1, 4>(l, x, tile, sums, after);
    else
      few_steps<2, 2>(l, x, tile, sums, after);
    now = next;
  }
  leave_tiles();
  return kDone;
}

static i64 integer_tiles(const IntegerLinear& l, Worker& w) {
  if (l.rows <= kLanes && l.rows * l.inputs <= kAlone) {
    std::int32_t* const sums = (std::int32_t*)w.scratch(kSumWords * 4 + Codes(l, nullptr).bytes());
    if (!sums) return kOutOfMemory;
    const Codes x(l, (char*)(sums + kSumWords));
    make_codes(l, x, 0, l.rows);
    __asm__ volatile("" ::: "memory");
    return few_rows(l, x, sums, w);
  }
  const Codes x(l, (char*)l.workspace);
  if (l.rows > kTileRows) return many_rows(l, x, w);
  for (Worker::Range r; w.next(r, l.rows, 1);) make_codes(l, x, r.first, r.last);
  w.barrier();
  std::int32_t* const sums = (std::int32_t*)w.scratch(kSumWords * 4);
  return sums ? few_rows(l, x, sums, w) : (i64)kOutOfMemory;
}
