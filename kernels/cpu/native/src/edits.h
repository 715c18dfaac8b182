// Changes to rows of logits: penalties, biases, bans, allow lists, masks, in this order.

struct ProcessLogits {
  i64 rows;
  const float* logits;  // [rows, columns] with this row stride
  i64 columns, row_stride;
  float* out;  // [rows, columns]
  // Pairs of row and column, of each kind its own number.
  i64 num_penalties;
  const i64 *penalty_rows, *penalty_columns;
  const float *repetition, *subtracted;
  i64 num_biases;
  const i64 *bias_rows, *bias_columns;
  const float* bias;
  i64 num_banned;
  const i64 *banned_rows, *banned_columns;
  i64 num_allowed;
  const i64 *allowed_rows, *allowed_columns;
  // Rows of which only the columns stay that have a bit: column c is bit c % 32 of word c / 32.
  i64 num_masks;
  const i64* mask_rows;
  const std::uint32_t* bits;  // [num_masks, ceil(columns / 32)]
};

// A row named in the allow list keeps only its own columns. `kept`: room for a value per pair.
static void keep_allowed(const ProcessLogits& p, Worker& w, float* kept) {
  const auto mine = [&](i64 i) { return p.allowed_rows[i] % w.count == w.index; };
  const auto at = [&](i64 i) { return p.out + p.allowed_rows[i] * p.columns; };
  for (i64 i = 0; i < p.num_allowed; ++i)
    if (mine(i)) kept[i] = at(i)[p.allowed_columns[i]];
  for (i64 i = 0; i < p.num_allowed; ++i)  // a row's pairs usually lie together: once is enough
    if (mine(i) && (i == 0 || p.allowed_rows[i] != p.allowed_rows[i - 1]))
      for (i64 c = 0; c < p.columns; ++c) at(i)[c] = -kInfinity;
  for (i64 i = 0; i < p.num_allowed; ++i)
    if (mine(i)) at(i)[p.allowed_columns[i]] = kept[i];
}

static void mask_row(const std::uint32_t* bits, float* x, i64 columns) {
  for (i64 word = 0, first = 0; first < columns; ++word, first += 32) {
    if (bits[word] == ~0u) continue;
    const i64 count = columns - first < 32 ? columns - first : 32;
    for (i64 c = 0; c < count; ++c) x[first + c] = bits[word] >> c & 1 ? x[first + c] : -kInfinity;
  }
}

// All threads copy; then each row has one thread that edits it.
static i64 process_logits(const ProcessLogits& p, Worker& w) {
  const auto wrong = [&](const i64* rows, const i64* columns, i64 n) {
    return outside(rows, {0, n}, p.rows) || outside(columns, {0, n}, p.columns);
  };
  if (wrong(p.penalty_rows, p.penalty_columns, p.num_penalties) || wrong(p.bias_rows, p.bias_columns, p.num_biases) ||
      wrong(p.banned_rows, p.banned_columns, p.num_banned) || wrong(p.allowed_rows, p.allowed_columns, p.num_allowed) ||
      outside(p.mask_rows, {0, p.num_masks}, p.rows))
    return kOutOfRange;
  if (!share(w, 4 * p.num_allowed + 1)) return kOutOfMemory;
  const i64 step = kGroup * kPieceGroups, pieces = ceil_div(p.columns, step);
  for (Worker::Range r; w.next(r, p.rows * pieces, 1);) {
    const i64 row = r.first / pieces, first = r.first % pieces * step;
    const i64 count = p.columns - first < step ? p.columns - first : step;
    __builtin_memcpy(p.out + row * p.columns + first, p.logits + row * p.row_stride + first, count * sizeof(float));
  }
  w.barrier();
  const auto for_pairs = [&](const i64* rows, const i64* columns, i64 n, auto edit) {
    for (i64 i = 0; i < n; ++i)
      if (rows[i] % w.count == w.index) edit(p.out[rows[i] * p.columns + columns[i]], i);
  };
  for_pairs(p.penalty_rows, p.penalty_columns, p.num_penalties,
            [&](float& x, i64 i) { x = (x > 0 ? x / p.repetition[i] : x * p.repetition[i]) - p.subtracted[i]; });
  for_pairs(p.bias_rows, p.bias_columns, p.num_biases, [&](float& x, i64 i) { x += p.bias[i]; });
  for_pairs(p.banned_rows, p.banned_columns, p.num_banned, [&](float& x, i64) { x = -kInfinity; });
  keep_allowed(p, w, (float*)common);
  const i64 words = ceil_div(p.columns, 32);
  for (i64 i = 0; i < p.num_masks; ++i)
    if (p.mask_rows[i] % w.count == w.index) mask_row(p.bits + i * words, p.out + p.mask_rows[i] * p.columns, p.columns);
  return kDone;
}
