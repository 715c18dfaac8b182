// What is done to each row of a step by itself: in fp32, rounded once at the end.

struct Norm {  // heads h of rows t: x + t * x_row + h * x_head, `dim` elements; residual and out likewise contiguous
  i64 rows, dtype, weight_dtype;
  const void* x;
  i64 heads, x_row, x_head, dim;
  void* residual;  // null, or read, added and overwritten by the sum
  const void* weight;
  double eps, offset;
  void* out;
};

// Of row t * heads + h; `out` may be of any type.
template <class T, class W, class Out>
INLINE void norm_row(const Norm& n, i64 row, Out* out) {
  const float eps = (float)n.eps, offset = (float)n.offset;
  const T* x = (const T*)n.x + row / n.heads * n.x_row + row % n.heads * n.x_head;
  f32x16 squares{};
  if (n.residual) {
    T* const sum = (T*)n.residual + row * n.dim;
    for_lanes(n.dim, [&](auto at, auto put) {
      put(sum, at(x) + at(sum));
      const f32x16 rounded = at(sum);
      squares = fma(rounded, rounded, squares);
    });
    x = sum;
  } else {
    for_lanes(n.dim, [&](auto at, auto) {
      const f32x16 v = at(x);
      squares = fma(v, v, squares);
    });
  }
  const float factor = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)n.dim + eps);
  for_lanes(n.dim, [&](auto at, auto put) { put(out, at(x) * factor * (at((const W*)n.weight) + offset)); });
}

static i64 norm(const Norm& n, Worker& worker) {
  for (Worker::Range r; worker.next(r, n.rows * n.heads, piece(n.dim));)
    with_dtype(n.dtype, [&](auto x) {
      with_dtype(n.weight_dtype, [&](auto w) {
        using T = decltype(x);
        for (i64 row = r.first; row < r.last; ++row) norm_row<T, decltype(w)>(n, row, (T*)n.out + row * n.dim);
      });
    });
  return kDone;
}

struct Rope {
  i64 rows, dtype;
  void *q, *k;
  i64 q_heads, k_heads, q_row, q_head, k_row, k_head, dim;
  const i64* positions;
  const float* table;  // [positions, rotary_dim]: cosines, then sines
  i64 table_rows, rotary_dim, interleaved;
};

template <class T>
INLINE void rotate(T* x, const float* cosines, const float* sines, i64 half, bool interleaved) {
  if (!interleaved) {
    for_lanes(half, [&](auto at, auto put) {
      const f32x16 a = at(x), b = at(x + half), c = at(cosines), s = at(sines);
      put(x, fma(a, c, -(b * s)));
      put(x + half, fma(b, c, a * s));
    });
    return;
  }
  for (i64 i = 0; i < half; i += kLanes) {
    const i64 count = half - i < kLanes ? half - i : kLanes;
    T even[kLanes] = {}, odd[kLanes] = {};
    for (i64 j = 0; j < count; ++j) even[j] = x[2 * (i + j)], odd[j] = x[2 * (i + j) + 1];
    const f32x16 a = load(even), b = load(odd), c = load_some(cosines + i, count), s = load_some(sines + i, count);
    store(even, fma(a, c, -(b * s)));
    store(odd, fma(b, c, a * s));
    for (i64 j = 0; j < count; ++j) x[2 * (i + j)] = even[j], x[2 * (i + j) + 1] = odd[j];
  }
}

INLINE bool outside(const i64* values, Worker::Range r, i64 end) {
  for (i64 i = r.first; i < r.last; ++i)
    if (values[i] < 0 || values[i] >= end) return true;
  return false;
}

static i64 rope(const Rope& r, Worker& worker) {
  const i64 half = r.rotary_dim / 2;
  for (Worker::Range some; worker.next(some, r.rows, piece((r.q_heads + r.k_heads) * r.dim));) {
    if (outside(r.positions, some, r.table_rows)) return kOutOfRange;
    with_dtype(r.dtype, [&](auto type) {
      using T = decltype(type);
      for (i64 row = some.first; row < some.last; ++row) {
        const float* const cosines = r.table + r.positions[row] * r.rotary_dim;
        for (i64 h = 0; h < r.q_heads; ++h)
          rotate((T*)r.q + row * r.q_row + h * r.q_head, cosines, cosines + half, half, r.interleaved);
        for (i64 h = 0; h < r.k_heads; ++h)
          rotate((T*)r.k + row * r.k_row + h * r.k_head, cosines, cosines + half, half, r.interleaved);
      }
    });
  }
  return kDone;
}

struct Gate {
  i64 rows, dtype;
  const void* x;  // [rows, 2 * width] with this row stride
  i64 x_row, width;
  void* out;  // [rows, width]
  i64 gelu;
};

// gelu by tanh: g / 2 * (1 + tanh(u)) = g * sigmoid(2u) with u = sqrt(2 / pi) (g + 0.044715 g^3).
INLINE f32x16 gelu(f32x16 g) {
  constexpr float kTwice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  return g * sigmoid(g * fma(g * g, splat(kTwice * 0.044715f), splat(kTwice)));
}

INLINE f32x16 silu(f32x16 g) { return g * sigmoid(g); }

// Columns [first, last) of a row, into out[0 ..].
template <class T, class Out>
INLINE void gate_row(const Gate& g, i64 row, i64 first, i64 last, Out* out) {
  const T *const gates = (const T*)g.x + row * g.x_row + first, *const up = gates + g.width;
  if (g.gelu)
    for_lanes(last - first, [&](auto at, auto put) { put(out, gelu(at(gates)) * at(up)); });
  else
    for_lanes(last - first, [&](auto at, auto put) { put(out, silu(at(gates)) * at(up)); });
}

static i64 gate(const Gate& g, Worker& worker) {
  // A row may be wide and alone: pieces are stretches of columns.
  constexpr i64 kStretch = 1024;
  const i64 stretches = (g.width + kStretch - 1) / kStretch;
  // An exponential and a division make an element worth several of a norm's.
  for (Worker::Range r; worker.next(r, g.rows * stretches, piece(4 * kStretch));)
    with_dtype(g.dtype, [&](auto type) {
      using T = decltype(type);
      for (i64 i = r.first; i < r.last; ++i) {
        const i64 row = i / stretches, first = i % stretches * kStretch;
        const i64 last = first + kStretch < g.width ? first + kStretch : g.width;
        gate_row<T>(g, row, first, last, (T*)g.out + row * g.width + first);
      }
    });
  return kDone;
}

struct AddResidual {
  i64 rows, dtype;
  void* x;  // [rows, width], overwritten by the sum
  const void* residual;
  i64 width;
};

static i64 add_residual(const AddResidual& a, Worker& worker) {
  for (Worker::Range r; worker.next(r, a.rows, piece(a.width));)
    with_dtype(a.dtype, [&](auto type) {
      using T = decltype(type);
      T* const x = (T*)a.x + r.first * a.width;
      const T* const residual = (const T*)a.residual + r.first * a.width;
      for_lanes((r.last - r.first) * a.width, [&](auto at, auto put) { put(x, at(x) + at(residual)); });
    });
  return kDone;
}

struct AddGated {
  i64 rows, dtype;
  void* out;                  // [rows, width], read, added to and overwritten
  const void *gate, *expert;  // [rows], [rows, width]
  i64 width;
};

static i64 add_gated(const AddGated& a, Worker& worker) {
  for (Worker::Range r; worker.next(r, a.rows, piece(a.width));)
    with_dtype(a.dtype, [&](auto type) {
      using T = decltype(type);
      for (i64 row = r.first; row < r.last; ++row) {
        T* const out = (T*)a.out + row * a.width;
        const T* const expert = (const T*)a.expert + row * a.width;
        const f32x16 share = sigmoid(splat(load_some((const T*)a.gate + row, 1)[0]));
        for_lanes(a.width, [&](auto at, auto put) { put(out, fma(share, at(expert), at(out))); });
      }
    });
  return kDone;
}
