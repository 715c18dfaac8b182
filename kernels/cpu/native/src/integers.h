// out = x * weight^T + bias with both factors in codes of eight bits (W8A8): the sums are exact integers, so no order
// of summation and no instruction set changes a bit of them. Of each: (sum * row's scale) * output's scale + bias.
//
//     x ─quantize─▶ codes, 16 rows by 64 inputs ─┐
//     weight: [output / 16][input / 64] tiles ───┴─▶ sums, two by two tiles ─▶ scales, bias ─▶ out
//
// A tile of weights is 1 KiB, [16 quads of inputs][16 outputs][4]: the second factor of a product of integer tiles, and
// 16 vectors for the instructions that add products of four bytes to words. Two tiles of outputs are a unit, whose
// memory is contiguous. A thread takes its next unit before it computes the last one taken, and fetches the one while
// it computes the other.

enum : i64 { kCodes = 2 };  // the dtype of x that was quantized by what made it

struct IntegerLinear {
  i64 rows, dtype;  // of x: a Dtype, or kCodes
  const void* x;    // [rows, inputs], x_row elements from row to row
  i64 x_row;
  const float* row_scales;  // of x in codes: one per row, scale_row from one to the next
  i64 scale_row;
  const float* input_scale;  // one for all rows; null = from each row its largest
  const std::int8_t* weight;
  const float* scales;       // [outputs, padded to 16]
  const std::int32_t* sums;  // [outputs, padded to 16]: of all codes of an output
  const float* bias;         // [outputs, padded to 16] or null
  i64 inputs, outputs, out_dtype;
  void* out;        // [rows, outputs]
  void* workspace;  // codes_bytes(rows padded to 16)
};

typedef std::int8_t i8;

constexpr i64 kStepInputs = 64, kStepBytes = kLanes * kStepInputs;
#if HAS_VNNI && !HAS_AMX
constexpr std::int32_t kCodesOffset = 128;  // x as unsigned bytes, its codes plus this
#else
constexpr std::int32_t kCodesOffset = 0;
#endif

// x in codes: [rows / 16][inputs / 64][16][64], the last tile row only as high as there are rows where all are
// below 16.
struct Codes {
  i8* tiles;
  float* scales;
  i64 rows, steps, height;  // of a tile: rows, 16 at most

  Codes(const IntegerLinear& l, char* memory)
      : rows(l.rows), steps((l.inputs + kStepInputs - 1) / kStepInputs), height(l.rows < kLanes ? l.rows : kLanes) {
    scales = (float*)memory;
    tiles = (i8*)memory + padded() * (i64)sizeof(float);
  }

  i64 padded() const { return (rows + kLanes - 1) / kLanes * kLanes; }
  i64 bytes() const { return padded() * (i64)(sizeof(float) + steps * kStepInputs); }
  i8* row(i64 r) const { return tiles + (r / kLanes * steps * height + r % kLanes) * kStepInputs; }
  i64 step() const { return height * kStepInputs; }  // from 64 inputs to the next
};

INLINE i32x16 larger(i32x16 a, i32x16 b) { return a > b ? a : b; }

INLINE void offset_codes(i8* codes) {
  for (i64 i = 0; kCodesOffset && i < kStepInputs; ++i) codes[i] = (i8)(codes[i] ^ kCodesOffset);
}

// The largest |x| of a row, or NaN where there is one: as integers, the bits of NaN are above all others.
template <class T>
INLINE float largest(const T* x, i64 count) {
  i32x16 top{};
  for_lanes(count, [&](auto at, auto) { top = larger(top, (i32x16)at(x) & 0x7fffffff); });
  std::int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found = found < top[i] ? top[i] : found;
  float result;
  __builtin_memcpy(&result, &found, sizeof result);
  return result;
}

INLINE void store_codes(i8* out, f32x16 v) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the integer, ties to even
  const i32x16 words = (i32x16)(min(max(v, splat(-127.0f)), splat(127.0f)) + kRound);
#if HAS_AVX512
  _mm_storeu_si128((__m128i*)out, _mm512_cvtepi32_epi8((__m512i)words));
#else
  for (int i = 0; i < kLanes; ++i) out[i] = (i8)words[i];
#endif
}

// One row of x to codes, as reference/rows.py has it; a row with a NaN gets it for a scale, and so for all its results.
template <class T>
INLINE void quantize(const IntegerLinear& l, const Codes& to, i64 r) {
  const T* x = (const T*)l.x + r * l.x_row;
  const float top = largest(x, l.inputs);
  const float scale = l.input_scale ? *l.input_scale : top > 0 ? top / 127.0f : 1.0f;
  i8* out = to.row(r);
  for (i64 k = 0; k < l.inputs; k += kStepInputs, out += to.step()) {
    const i64 count = l.inputs - k < kStepInputs ? l.inputs - k : kStepInputs;
    if (count < kStepInputs) __builtin_memset(out, 0, kStepInputs);
    i64 i = 0;
    for (; i + kLanes <= count; i += kLanes) store_codes(out + i, load(x + k + i) / scale);
    if (i < count) store_codes(out + i, load_some(x + k + i, count - i) / scale);
    offset_codes(out);
  }
  to.scales[r] = top == top ? scale : top;
}

INLINE void copy_codes(const IntegerLinear& l, const Codes& to, i64 r) {
  const i8* x = (const i8*)l.x + r * l.x_row;
  i8* out = to.row(r);
  for (i64 k = 0; k < l.inputs; k += kStepInputs, out += to.step()) {
    if (l.inputs - k >= kStepInputs) {
      __builtin_memcpy(out, x + k, kStepInputs);
    } else {
      __builtin_memset(out, 0, kStepInputs);
      __builtin_memcpy(out, x + k, l.inputs - k);
    }
    offset_codes(out);
  }
  to.scales[r] = l.row_scales[r * l.scale_row];
}

static void make_codes(const IntegerLinear& l, const Codes& to, i64 first, i64 last) {
  if (l.dtype == kCodes)
    for (i64 r = first; r < last; ++r) copy_codes(l, to, r);
  else
    with_dtype(l.dtype, [&](auto t) {
      for (i64 r = first; r < last; ++r) quantize<decltype(t)>(l, to, r);
    });
}

INLINE f32x16 to_float(i32x16 v) {
#if HAS_AVX512  // the portable form becomes two conversions of eight
  return (f32x16)_mm512_cvtepi32_ps((__m512i)v);
#else
  return __builtin_convertvector(v, f32x16);
#endif
}

INLINE i32x16 load_words(const std::int32_t* p) {
  i32x16 v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The sums of a row and 16 outputs to out.
template <class T>
INLINE void finish(const IntegerLinear& l, const Codes& x, i64 row, i64 output, i32x16 sums) {
  f32x16 v = to_float(sums) * x.scales[row] * load(l.scales + output);
  if (l.bias) v += load(l.bias + output);
  T* const out = (T*)l.out + row * l.outputs + output;
  if (const i64 left = l.outputs - output; left >= kLanes)
    store(out, v);
  else
    store_some(out, v, left);
}

// Few rows take what lies in memory once, and the time for that is all: every thread walks through a stretch of it.
// Units are taken in turn, so unit u is the next of the stretch of thread u % count.
INLINE i64 in_stretches(i64 unit, i64 units, i64 count) {
  const i64 length = units / count;
  return unit < length * count ? unit % count * length + unit / count : unit;
}

// So few codes every thread makes for itself: to wait for the others would take longer.
constexpr i64 kAlone = 16384;

#if HAS_AMX
#include "integers_tiles.h"
#else
#include "integers_dots.h"
#endif

static i64 linear_w8a8(const IntegerLinear& l, Worker& w) {
  if (l.rows == 0) return kDone;
#if HAS_AMX
  return integer_tiles(l, w);
#else
  return integer_dots(l, w);
#endif
}

// Of few rows: the outputs that a thread begins with.
INLINE Soon first_codes(const IntegerLinear& l, i64 index, i64 threads) {
  constexpr i64 kWidth = 4;
  const i64 units = l.outputs / (kWidth * kLanes), all = (l.outputs + kWidth * kLanes - 1) / (kWidth * kLanes);
  if (l.rows > kLanes || index >= units) return {};
  const i64 unit = kWidth * ((l.inputs + kStepInputs - 1) / kStepInputs) * kStepBytes;
  return {(const char*)l.weight + in_stretches(index, all, threads) * unit, unit / 64};
}
