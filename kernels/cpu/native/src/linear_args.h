// The arguments of a product out = x * weight^T + bias, with weights as linear.py and linear_quantized.py pack them.
// Outputs are padded to 16 and inputs to 32, with zeros; the layout is the same for every instruction set.
//
//   kFloats, x in bf16   [outputs / 16][inputs / 32][16 pairs of inputs][16 outputs][2] bf16: tiles of AMX
//   kFloats, x in fp32   [outputs / 16][inputs][16 outputs] fp32
//   kInt8                like bf16 tiles, a signed byte each
//   kInt4                [outputs / 16][inputs / 32][4 lines][32 words of 16 bits]: word 2 o + p of line i belongs to
//                        output o and to inputs of parity p; its nibble j is the code of pair 4 i + j
//
// w = code * scale, of kInt4 (code - zero) * scale.

constexpr float kMiddle = 8;  // of four-bit codes: the zero of symmetric ones

enum WeightKind : i64 { kFloats = 0, kInt8 = 1, kInt4 = 2 };

struct Linear {
  i64 rows;
  i64 dtype, out_dtype;
  const void* x;  // [rows, inputs]
  i64 x_row;
  i64 kind;
  const void* weight;
  const float* scales;  // [outputs / 16][groups][16]; null for kFloats
  const float* zeros;   // likewise, of kInt4; null = all are kMiddle
  i64 group;            // inputs per scale: a multiple of 32, or all inputs
  const float* bias;    // [outputs, padded] or null
  i64 inputs, outputs;
  void* out;          // [rows, outputs]
  const i64* row_of;  // null, or which row of x each one is: of an expert, those that chose it
};
