// Rows of a table by their numbers, which come from requests: embeddings of tokens, hidden rows that draw.

struct Gather {
  i64 rows, dtype;
  const void* table;  // [table_rows, width]
  i64 table_rows, width;
  const i64* ids;
  double scale;
  void* out;  // [rows, width]
};

static i64 gather(const Gather& g, Worker& worker) {
  const float scale = (float)g.scale;
  for (Worker::Range r; worker.next(r, g.rows, piece(g.width));) {
    if (outside(g.ids, r, g.table_rows)) return kOutOfRange;
    with_dtype(g.dtype, [&](auto type) {
      using T = decltype(type);
      for (i64 row = r.first; row < r.last; ++row) {
        const T* const from = (const T*)g.table + g.ids[row] * g.width;
        T* const out = (T*)g.out + row * g.width;
        if (scale == 1.0f)
          copy_row(from, out, g.width);
        else
          for_lanes(g.width, [&](auto at, auto put) { put(out, at(from) * scale); });
      }
    });
  }
  return kDone;
}
