// Log-probabilities of given tokens, their ranks, and the likeliest tokens beside them.

struct TokenLogprobs {
  i64 rows;
  const float* logits;  // [rows, columns] with this row stride
  i64 columns, row_stride;
  const i64* ids;  // [rows]
  i64 k;
  float* logprob;       // [rows]
  i64 *rank, *top_ids;  // [rows], [rows, k]
  float* top_logprobs;  // [rows, k]
};

// 1 + how many of the row are above x.
static i64 rank_of(const Row& row, float x) {
  i64 rank = 1;
  for_groups(row, x, 0, row.groups(), [&](i64 group) {
    for (i64 c = group * kGroup; c < (group + 1) * kGroup && c < row.columns; c += kLanes)
      rank += __builtin_popcount(bits_above(x_of(row, c), splat(x)) & first_bits(row.columns - c));
  });
  return rank;
}

// Sort the list by x, the largest first; of equals those that came first stay first. By the bytes of -x.
static void sort_by_rank(List& list) {
  constexpr int kDigits = 256;
  std::int32_t* others = (std::int32_t*)list.amounts;
  for (int shift = 0; shift < 32; shift += 8) {
    const auto digit_of = [&](i64 i) {
      std::uint32_t bits;
      __builtin_memcpy(&bits, list.x + i, sizeof bits);
      return (bits & 0x7FFFFFFFu) >> shift & (kDigits - 1);
    };
    i64 places[kDigits + 1] = {};
    for (i64 i = 0; i < list.size; ++i) ++places[digit_of(i) + 1];
    for (int d = 0; d < kDigits; ++d) places[d + 1] += places[d];
    for (i64 i = 0; i < list.size; ++i) {
      const i64 place = places[digit_of(i)]++;
      list.left[place] = list.x[i];
      others[place] = list.columns[i];
    }
    __builtin_memcpy(list.x, list.left, list.size * sizeof(float));
    __builtin_memcpy(list.columns, others, list.size * sizeof(std::int32_t));
  }
}

static void likeliest(const Row& row, i64 k, List& list, i64* ids, float* logprobs) {
  if (k == 0) return;
  if (row.shift != row.shift) {  // a row of NaN has no order
    for (i64 i = 0; i < k; ++i) ids[i] = i, logprobs[i] = row.shift;
    return;
  }
  Kept kept = kAll;
  if (k < row.columns) {
    collect(row, {floor_of(row, false, (double)k, list), kNoColumn}, list);
    weigh(list.x, list.amounts, list.size, false);
    kept = leading(list, (double)k);
  }
  collect(row, kept, list);
  sort_by_rank(list);
  for (i64 i = 0; i < k; ++i) ids[i] = list.columns[i], logprobs[i] = list.x[i];
}

static i64 token_logprobs(const TokenLogprobs& a, Worker& w) {
  if (outside(a.ids, {0, a.rows}, a.columns)) return kOutOfRange;
  Survey s(a.columns);
  const i64 bytes = a.rows * s.stride;
  if (!share(w, bytes + w.count * List::bytes(a.columns))) return kOutOfMemory;
  s.memory = common;
  const auto row_of = [&](i64 index) {
    const float* const logits = a.logits + index * a.row_stride;
    return Row{logits, a.columns, s.peaks(index), find_top(logits, a.columns, s.peaks(index)).value, 1, 0};
  };
  find_all_peaks(s, a.logits, a.row_stride, a.rows, w);
  for_pieces(s, a.rows, w, 1, [&](i64 index, i64 piece) {
    const Worker::Range groups = s.groups_of(piece);
    s.masses(index)[piece] = mass_of(row_of(index), groups.first, groups.last);
  });
  w.barrier();
  List list = List::in(common + bytes + w.index * List::bytes(a.columns), a.columns);
  for (Worker::Range r; w.next(r, a.rows, 1, 2);) {
    Row row = row_of(r.first);
    double mass = 0;
    for (i64 i = 0; i < s.pieces; ++i) mass += s.masses(r.first)[i];
    row.shift = finite(row.top) ? (float)__builtin_log(mass) : __builtin_nanf("");
    a.logprob[r.first] = scaled(row, row.logits[a.ids[r.first]]);
    a.rank[r.first] = rank_of(row, a.logprob[r.first]);
    likeliest(row, a.k, list, a.top_ids + r.first * a.k, a.top_logprobs + r.first * a.k);
  }
  return kDone;
}
