// Keys and values into the pages, and slots and blocks of pages elsewhere.

struct RopeKvWrite {  // q and k are rotated where there is a table, k and v written; without a table, q is not touched
  i64 rows, dtype, format;
  void* q;
  const void *k, *v;
  i64 q_heads, heads, q_row, q_head, k_row, k_head, v_row, v_head, dim;
  const i64* positions;
  const float* table;  // null, or [positions, rotary_dim]: cosines, then sines
  i64 table_rows, rotary_dim, interleaved;
  void *k_cache, *v_cache;        // [slots, heads, width]
  const void *k_scale, *v_scale;  // null; [heads] fp32; or [slots, heads] fp16, which is written
  i64 num_slots;
  const i64* slots;
};

// A head from where it was computed to its slot; `row` and `bytes` are room for whole vectors of it.
template <class T>
INLINE void write_head(const RopeKvWrite& w, const T* x, i64 at, i64 head, bool is_key, float* row,
                       std::uint8_t* bytes) {
  const void* const scale = is_key ? w.k_scale : w.v_scale;
  char* const codes = (char*)(is_key ? w.k_cache : w.v_cache) + at * row_bytes(w.format, w.dim);
  if (w.format == w.dtype) {
    __builtin_memcpy(codes, x, w.dim * sizeof(T));
    return;
  }
  copy_row(x, row, w.dim);
  if (is_key && w.format == kKvInt4) turn(row, w.dim);
  encode(w.format, row, w.dim, w.format == kKvFp8 ? ((const float*)scale)[head] : 1.0f, bytes, codes,
         has_token_scales(w.format) ? (std::uint16_t*)scale + at : nullptr);
}

template <class T>
static void write_row(const RopeKvWrite& w, i64 t, char* room) {
  const i64 whole = whole_vectors(w.dim), half = w.rotary_dim / 2;
  float* const row = (float*)room;
  T* const turned = (T*)(row + whole);
  std::uint8_t* const bytes = (std::uint8_t*)(turned + whole);
  const float* const cosines = w.table ? w.table + w.positions[t] * w.rotary_dim : nullptr;
  for (i64 h = 0; w.table && h < w.q_heads; ++h)
    rotate((T*)w.q + t * w.q_row + h * w.q_head, cosines, cosines + half, half, w.interleaved);
  for (i64 h = 0; h < w.heads; ++h) {
    const T* key = (const T*)w.k + t * w.k_row + h * w.k_head;
    const i64 at = w.slots[t] * w.heads + h;
    if (w.table) {
      __builtin_memcpy(turned, key, w.dim * sizeof(T));
      rotate(turned, cosines, cosines + half, half, w.interleaved);
      key = turned;
    }
    write_head(w, key, at, h, true, row, bytes);
    write_head(w, (const T*)w.v + t * w.v_row + h * w.v_head, at, h, false, row, bytes);
  }
}

static i64 rope_kv_write(const RopeKvWrite& w, Worker& worker) {
  const i64 whole = whole_vectors(w.dim);
  char* const room = worker.scratch(9 * whole);
  if (!room) return kOutOfMemory;
  __builtin_memset(room, 0, 4 * whole);
  for (Worker::Range some; worker.next(some, w.rows, piece((w.q_heads + 2 * w.heads) * w.dim));) {
    if (outside(w.slots, some, w.num_slots)) return kOutOfRange;
    if (w.table && outside(w.positions, some, w.table_rows)) return kOutOfRange;
    with_dtype(w.dtype, [&](auto type) {
      for (i64 t = some.first; t < some.last; ++t) write_row<decltype(type)>(w, t, room);
    });
  }
  return kDone;
}

struct Move {  // unit to[i] = what unit from[i] was before any of them moved
  i64 rows, bytes, units;
  void* pages;  // [units, bytes]
  const i64 *from, *to;
  void* between;  // [rows, bytes]
};

static i64 move(const Move& m, Worker& worker) {
  if (outside(m.from, {0, m.rows}, m.units) || outside(m.to, {0, m.rows}, m.units)) return kOutOfRange;
  const auto copy = [&](i64 phase, auto target, auto source) {
    for (Worker::Range r; worker.next(r, m.rows, piece(m.bytes), phase);)
      for (i64 i = r.first; i < r.last; ++i) __builtin_memcpy(target(i), source(i), m.bytes);
  };
  const auto page = [&](i64 unit) { return (char*)m.pages + unit * m.bytes; };
  const auto kept = [&](i64 i) { return (char*)m.between + i * m.bytes; };
  copy(0, kept, [&](i64 i) { return page(m.from[i]); });
  worker.barrier();
  copy(1, [&](i64 i) { return page(m.to[i]); }, kept);
  return kDone;
}

struct Hadamard {  // heads h of rows t: x + t * x_row + h * x_head, `dim` elements; out contiguous
  i64 rows, dtype;
  const void* x;
  i64 heads, x_row, x_head, dim;
  void* out;
};

static i64 hadamard(const Hadamard& h, Worker& worker) {
  float* const row = (float*)worker.scratch(4 * h.dim);
  if (!row) return kOutOfMemory;
  for (Worker::Range r; worker.next(r, h.rows * h.heads, piece(4 * h.dim));)
    with_dtype(h.dtype, [&](auto type) {
      using T = decltype(type);
      for (i64 i = r.first; i < r.last; ++i) {
        copy_row((const T*)h.x + i / h.heads * h.x_row + i % h.heads * h.x_head, row, h.dim);
        turn(row, h.dim);
        copy_row(row, (T*)h.out + i * h.dim, h.dim);
      }
    });
  return kDone;
}
