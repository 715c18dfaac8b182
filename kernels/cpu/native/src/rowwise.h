// What is done to each row of a step by itself. Rows [first, last) per call, in fp32, rounded once at the end.

template <class T, class W>
static void norm_rows(const Norm& n, i64 first, i64 last) {
  for (i64 row = first; row < last; ++row) {
    const T* x = (const T*)n.x + row / n.heads * n.x_row + row % n.heads * n.x_head;
    T* const out = (T*)n.out + row * n.dim;
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
    const float factor = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)n.dim + n.eps);
    for_lanes(n.dim, [&](auto at, auto put) { put(out, at(x) * factor * (at((const W*)n.weight) + n.offset)); });
  }
}

static void norm(const Norm& n, i64 first, i64 last) {
  with_dtype(n.dtype, [&](auto x) {
    with_dtype(n.weight_dtype, [&](auto w) { norm_rows<decltype(x), decltype(w)>(n, first, last); });
  });
}

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

static void rope(const Rope& r, i64 first, i64 last) {
  const i64 half = r.rotary_dim / 2;
  with_dtype(r.dtype, [&](auto type) {
    using T = decltype(type);
    for (i64 row = first; row < last; ++row) {
      const float* const cosines = r.table + r.positions[row] * r.rotary_dim;
      for (i64 h = 0; h < r.q_heads; ++h)
        rotate((T*)r.q + row * r.q_row + h * r.q_head, cosines, cosines + half, half, r.interleaved);
      for (i64 h = 0; h < r.k_heads; ++h)
        rotate((T*)r.k + row * r.k_row + h * r.k_head, cosines, cosines + half, half, r.interleaved);
    }
  });
}

static void kv_write(const KvWrite& w, i64 first, i64 last) {
  with_dtype(w.dtype, [&](auto from) {
    with_dtype(w.cache_dtype, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      for (i64 row = first; row < last; ++row)
        for (i64 h = 0; h < w.heads; ++h) {
          const i64 at = (w.slots[row] * w.heads + h) * w.dim;
          copy_row((const From*)w.k + row * w.k_row + h * w.k_head, (To*)w.k_cache + at, w.dim);
          copy_row((const From*)w.v + row * w.v_row + h * w.v_head, (To*)w.v_cache + at, w.dim);
        }
    });
  });
}

// gelu by tanh: g / 2 * (1 + tanh(u)) = g * sigmoid(2u) with u = sqrt(2 / pi) (g + 0.044715 g^3).
INLINE f32x16 gelu(f32x16 g) {
  constexpr float kTwice = 1.5957691216057308f;  // 2 sqrt(2 / pi)
  return g * sigmoid(g * fma(g * g, splat(kTwice * 0.044715f), splat(kTwice)));
}

INLINE f32x16 silu(f32x16 g) { return g * sigmoid(g); }

static void gate(const Gate& g, i64 first, i64 last) {
  with_dtype(g.dtype, [&](auto type) {
    using T = decltype(type);
    for (i64 row = first; row < last; ++row) {
      const T *gates = (const T*)g.x + row * g.x_row, *up = gates + g.width;
      T* const out = (T*)g.out + row * g.width;
      if (g.gelu)
        for_lanes(g.width, [&](auto at, auto put) { put(out, gelu(at(gates)) * at(up)); });
      else
        for_lanes(g.width, [&](auto at, auto put) { put(out, silu(at(gates)) * at(up)); });
    }
  });
}
