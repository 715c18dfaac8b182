// Which experts a token goes to, and by what weight.

struct Route {
  i64 rows, dtype;
  const void* logits;  // [rows, experts]
  i64 experts, top_k, renormalize;
  float* weights;  // [rows, top_k]
  i64* ids;
};

// The top_k largest of n values in falling order, of equals the lower id first. NaN is larger than nothing; the ids are
// distinct in any case.
INLINE void largest(const float* values, i64 n, i64 top_k, float* best, i64* ids) {
  for (i64 i = 0, found = 0; i < n; ++i) {
    if (found == top_k && !(values[i] > best[top_k - 1])) continue;
    if (found < top_k) ++found;
    i64 place = found - 1;
    for (; place > 0 && values[i] > best[place - 1]; --place)
      best[place] = best[place - 1], ids[place] = ids[place - 1];
    best[place] = values[i], ids[place] = i;
  }
}

static i64 route(const Route& r, Worker& worker) {
  const i64 padded = (r.experts + kLanes - 1) / kLanes * kLanes;
  float* const logits = (float*)worker.scratch(4 * padded);
  if (!logits) return kOutOfMemory;
  for (Worker::Range some; worker.next(some, r.rows, piece(8 * r.experts));)
    for (i64 row = some.first; row < some.last; ++row) {
      with_dtype(r.dtype,
                 [&](auto type) { copy_row((const decltype(type)*)r.logits + row * r.experts, logits, r.experts); });
      for (i64 i = r.experts; i < padded; ++i) logits[i] = -kInfinity;
      float* const weights = r.weights + row * r.top_k;
      largest(logits, r.experts, r.top_k, weights, r.ids + row * r.top_k);
      const float top = weights[0];
      f32x16 sums{};
      for (i64 i = 0; i < padded; i += kLanes) sums += exp2((load(logits + i) - top) * kLog2E);
      const float total = sum_lanes(sums);
      float chosen = 0;
      for (i64 k = 0; k < r.top_k; ++k) {
        weights[k] = exp2((weights[k] - top) * kLog2E) / total;
        chosen += weights[k];
      }
      for (i64 k = 0; r.renormalize && k < r.top_k; ++k) weights[k] /= chosen;
    }
  return kDone;
}
