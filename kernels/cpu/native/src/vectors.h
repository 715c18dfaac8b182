// out = x * weight^T + bias by vectors, on the layouts of linear_args.h: for levels without tiles, and for x in fp32.
//
//     weights of 64 outputs, 128 inputs ─widen─▶ panel in fp32 ─┐
//     x, the same inputs ─widen─────────────────────────────────┴─▶ sums += x * panel ────────────▶ bias ─▶ out
//
// A panel holds what the weights stand for, (code - zero) * scale, and is made once for up to 512 rows. Sums run over
// the inputs in order, however many rows there are.

// Rows and vectors of 16 columns whose sums fit in the registers together with what they are made from.
#if HAS_AVX512
constexpr int kSumRows = 6, kSumVectors = 4;
#elif HAS_AVX2
constexpr int kSumRows = 3, kSumVectors = 2;
#else
constexpr int kSumRows = 3, kSumVectors = 1;
#endif

// What a register holds of a sum. With AVX2 that is half of a vector, and written out: the compiler keeps vectors of two
// registers in memory, which takes ten times as long.
#if HAS_AVX2 && !HAS_AVX512
typedef __m256 Part;
INLINE Part load_part(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store_part(float* p, Part v) { _mm256_storeu_ps(p, v); }
INLINE Part add_product(float x, Part b, Part sum) { return _mm256_fmadd_ps(_mm256_set1_ps(x), b, sum); }
#else
typedef f32x16 Part;
INLINE Part load_part(const float* p) { return load(p); }
INLINE void store_part(float* p, Part v) { store(p, v); }
INLINE Part add_product(float x, Part b, Part sum) { return fma(splat(x), b, sum); }
#endif
constexpr i64 kPartLanes = sizeof(Part) / sizeof(float);

// c[rows][columns] += a[rows][depth] * b[depth][columns]; every sum runs over the depth in order.
template <int Rows, int Vectors>
INLINE void add_sums(i64 depth, const float* a, i64 a_row, const float* b, i64 b_row, float* c, i64 c_row) {
  constexpr int kParts = Vectors * kLanes / kPartLanes;
  Part sum[Rows][kParts];
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < kParts; ++j) sum[i][j] = load_part(c + i * c_row + j * kPartLanes);
  for (i64 k = 0; k < depth; ++k)
    for (int i = 0; i < Rows; ++i)
      for (int j = 0; j < kParts; ++j)
        sum[i][j] = add_product(a[i * a_row + k], load_part(b + k * b_row + j * kPartLanes), sum[i][j]);
  for (int i = 0; i < Rows; ++i)
    for (int j = 0; j < kParts; ++j) store_part(c + i * c_row + j * kPartLanes, sum[i][j]);
}

template <int Rows>
INLINE void add_rows(i64 columns, i64 depth, const float* a, i64 a_row, const float* b, i64 b_row, float* c, i64 c_row) {
  i64 n = 0;
  for (; n + kSumVectors * kLanes <= columns; n += kSumVectors * kLanes)
    add_sums<Rows, kSumVectors>(depth, a, a_row, b + n, b_row, c + n, c_row);
  for (; n < columns; n += kLanes) add_sums<Rows, 1>(depth, a, a_row, b + n, b_row, c + n, c_row);
}

static void add_products(i64 rows, i64 columns, i64 depth, const float* a, i64 a_row, const float* b, i64 b_row,
                         float* c, i64 c_row) {
  for (i64 m = 0; m < rows;) {
    const i64 blocks = (rows - m + kSumRows - 1) / kSumRows, now = (rows - m + blocks - 1) / blocks;
    const float* some = a + m * a_row;
    float* into = c + m * c_row;
    switch (now) {
      case 1: add_rows<1>(columns, depth, some, a_row, b, b_row, into, c_row); break;
      case 2: add_rows<2>(columns, depth, some, a_row, b, b_row, into, c_row); break;
      case 3: add_rows<3>(columns, depth, some, a_row, b, b_row, into, c_row); break;
#if HAS_AVX512
      case 4: add_rows<4>(columns, depth, some, a_row, b, b_row, into, c_row); break;
      case 5: add_rows<5>(columns, depth, some, a_row, b, b_row, into, c_row); break;
      default: add_rows<6>(columns, depth, some, a_row, b, b_row, into, c_row); break;
#endif
    }
    m += now;
  }
}

constexpr i64 kPanelInputs = 128, kPanelRows = 512, kPairs = 16;

struct Affine {
  f32x16 zero, scale;
};

INLINE f32x16 value(i32x16 code, const Affine& a) { return (to_float(code) - a.zero) * a.scale; }

// 32 inputs of 16 outputs as rows of `width` fp32.
INLINE void widen_bf16(const char* tile, float* out, i64 width) {
  for (i64 pair = 0; pair < kPairs; ++pair, tile += 64, out += 2 * width) {
    u32x16 words;
    __builtin_memcpy(&words, tile, sizeof words);
    store(out, (f32x16)(words << 16));
    store(out + width, (f32x16)(words & 0xffff0000u));
  }
}

INLINE void widen_int8(const char* tile, float* out, i64 width, const Affine& a) {
  for (i64 pair = 0; pair < kPairs; ++pair, tile += 32, out += 2 * width) {
    const u32x16 words = load_halves((const bf16*)tile);
    store(out, value((i32x16)(words << 24) >> 24, a));
    store(out + width, value((i32x16)(words << 16) >> 24, a));
  }
}

INLINE void widen_int4(const char* tile, float* out, i64 width, const Affine& a) {
  for (i64 line = 0; line < 4; ++line, tile += 64) {
    u32x16 words;
    __builtin_memcpy(&words, tile, sizeof words);
    for (i64 pair = 0; pair < 4; ++pair, words >>= 4, out += 2 * width) {
      store(out, value((i32x16)(words & 15u), a));
      store(out + width, value((i32x16)((words >> 16) & 15u), a));
    }
  }
}

// Inputs [first, last) of tile `tile` of outputs.
INLINE void widen(const Linear& l, i64 tile, i64 first, i64 last, float* out, i64 width) {
  if (l.dtype == kFloat32 && l.kind == kFloats) {
    const float* w = (const float*)l.weight + (tile * l.inputs + first) * kLanes;
    for (i64 k = first; k < last; ++k, w += kLanes, out += width) store(out, load(w));
    return;
  }
  const i64 steps = (l.inputs + 31) / 32, groups = l.kind == kFloats ? 0 : (l.inputs + l.group - 1) / l.group;
  const i64 bytes = l.kind == kFloats ? 1024 : l.kind == kInt8 ? 512 : 256;
  for (i64 k = first; k < last; k += 32, out += 32 * width) {
    const char* from = (const char*)l.weight + (tile * steps + k / 32) * bytes;
    if (l.kind == kFloats) {
      widen_bf16(from, out, width);
      continue;
    }
    const i64 at = (tile * groups + k / l.group) * kLanes;
    const f32x16 zero = l.kind != kInt4 ? f32x16{} : l.zeros ? load(l.zeros + at) : splat(kMiddle);
    const Affine a{zero, load(l.scales + at)};
    l.kind == kInt8 ? widen_int8(from, out, width, a) : widen_int4(from, out, width, a);
  }
}

// Outputs of the tiles [tile, end) for the rows [top, bottom); of `memory`, panel, x and sums.
static void vector_block(const Linear& l, i64 top, i64 bottom, i64 tile, i64 end, float* memory) {
  const i64 rows = bottom - top, width = (end - tile) * kLanes;
  float* const panel = memory;
  float* const wide = panel + kPanelInputs * kSumVectors * kLanes;
  float* const sums = wide + rows * kPanelInputs;
  __builtin_memset(sums, 0, rows * width * sizeof(float));
  for (i64 first = 0; first < l.inputs; first += kPanelInputs) {
    const i64 last = first + kPanelInputs < l.inputs ? first + kPanelInputs : l.inputs;
    for (i64 t = tile; t < end; ++t) widen(l, t, first, last, panel + (t - tile) * kLanes, width);
    const float* x = (const float*)l.x + top * l.x_row + first;
    i64 x_row = l.x_row;
    if (l.dtype == kBfloat16) {
      for (i64 r = 0; r < rows; ++r)
        copy_row((const bf16*)l.x + (top + r) * l.x_row + first, wide + r * kPanelInputs, last - first);
      x = wide;
      x_row = kPanelInputs;
    }
    add_products(rows, width, last - first, x, x_row, panel, width, sums, width);
  }
  with_dtype(l.out_dtype, [&](auto type) {
    for (i64 r = 0; r < rows; ++r)
      for (i64 t = tile; t < end; ++t) {
        f32x16 v = load(sums + r * width + (t - tile) * kLanes);
        if (l.bias) v += load(l.bias + t * kLanes);
        auto* const out = (decltype(type)*)l.out + (top + r) * l.outputs + t * kLanes;
        if (const i64 left = l.outputs - t * kLanes; left >= kLanes)
          store(out, v);
        else
          store_some(out, v, left);
      }
  });
}

static i64 vector_linear(const Linear& l, Worker& w) {
  if (l.rows == 0) return kDone;
  const i64 most = l.rows < kPanelRows ? l.rows : kPanelRows, blocks = (l.rows + kPanelRows - 1) / kPanelRows;
  const i64 floats = kPanelInputs * kSumVectors * kLanes + most * (kPanelInputs + kSumVectors * kLanes);
  float* const memory = (float*)w.scratch(floats * sizeof(float));
  if (!memory) return kOutOfMemory;
  const i64 tiles = (l.outputs + kLanes - 1) / kLanes, units = (tiles + kSumVectors - 1) / kSumVectors;
  for (Worker::Range r; w.next(r, units * blocks, 1);) {
    const i64 top = r.first / units * kPanelRows, tile = in_stretches(r.first % units, units, w.count) * kSumVectors;
    vector_block(l, top, top + most < l.rows ? top + most : l.rows, tile,
                 tile + kSumVectors < tiles ? tile + kSumVectors : tiles, memory);
  }
  return kDone;
}
