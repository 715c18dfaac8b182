// What the C interface and the kernels of each instruction set share: arguments and the table of functions.
// No standard library beyond <cstdint>: inline functions of a header compiled for AVX-512 must never be the ones
// that the linker keeps for everybody.
#pragma once
#include <cstdint>

namespace quire {

using i64 = std::int64_t;

struct bf16 {
  std::uint16_t bits;
};

constexpr i64 kInterface = 3;  // one more for every change of what library.py calls

enum Dtype : i64 { kFloat32 = 0, kBfloat16 = 1 };  // the codes that library.py passes

constexpr i64 kTileKeys = 64;      // keys per step of the online softmax: one 64-bit word of visibility per row
constexpr i64 kSegmentKeys = 512;  // keys that are summed before they are merged into what came before
constexpr i64 kBlockRows = 16;     // rows of a matrix tile

struct Norm {  // heads h of rows t: x + t * x_row + h * x_head, `dim` elements; residual and out likewise contiguous
  i64 dtype, weight_dtype;
  const void* x;
  i64 heads, x_row, x_head, dim;
  void* residual;  // null, or read, added and overwritten by the sum
  const void* weight;
  float eps, offset;
  void* out;
};

struct Rope {
  i64 dtype;
  void *q, *k;
  i64 q_heads, k_heads, q_row, q_head, k_row, k_head;
  const i64* positions;
  const float* table;  // [positions, rotary_dim]: cosines, then sines
  i64 rotary_dim;
  bool interleaved;
};

struct KvWrite {
  i64 dtype, cache_dtype;
  const void *k, *v;
  i64 k_row, k_head, v_row, v_head, heads, dim;
  void *k_cache, *v_cache;  // [slots, heads, dim]
  const i64* slots;
};

struct Gate {
  i64 dtype;
  const void* x;  // [rows, 2 * width] with this row stride
  i64 x_row, width;
  void* out;  // [rows, width]
  bool gelu;
};

struct Linear {  // bf16; rows beyond 16 come in multiples of 16, inputs in multiples of 32
  const void* x;       // [rows, inputs]
  const void* weight;  // [outputs / 16, inputs / 32, 16, 16, 2]: tiles of pairs of inputs by outputs, padded with zeros
  const float* bias;   // [outputs, padded to 16] or null
  i64 rows, inputs, outputs;
  void* out;  // [rows, outputs]
};

struct Batch {  // a prepared RaggedBatch; null tree_mask, window 0 = none
  const std::int32_t *cu_q, *seq_lens, *block_table;
  i64 table_width;
  const i64 *positions, *tree_mask;
  i64 num_seqs, num_tokens, block_size, window;
  // Sequences members[first_member[g]] to members[first_member[g + 1] - 1] begin with the same shared_keys[g] keys.
  const i64 *first_member, *members, *shared_keys;
  i64 num_groups;
};

struct Attention {
  Batch batch;
  i64 dtype, cache_dtype;
  const void* q;
  i64 q_row, q_head;
  const void *k, *v;  // [num_blocks, block_size, kv_heads, dim]
  i64 num_blocks, q_heads, kv_heads, dim;
  float scale, softcap;
  const float* sinks;
  void* out;   // [tokens, q_heads, dim]
  float* lse;  // [tokens, q_heads]
};

// Softmax in progress, per matrix row: o = sum of weights * values, l = sum of weights in 16 lanes, and the exponent
// m that both are relative to (base 2).
struct StateView {
  float *o, *l, *m;
};

constexpr i64 padded_rows(i64 rows) { return (rows + kBlockRows - 1) / kBlockRows * kBlockRows; }
constexpr i64 state_floats(i64 rows, i64 dim) { return padded_rows(rows) * (dim + 16 + 1); }
inline StateView state_at(float* p, i64 rows, i64 dim) {
  const i64 n = padded_rows(rows);
  return {p, p + n * dim, p + n * (dim + 16)};
}

// What a group's prefix left for some of its rows: states of `rows` matrix rows one after another, theirs from `first`
// on. Closed ones hold whole segments, an open one the beginning of the segment that the rows themselves go on with.
struct Prefix {
  float* states;
  i64 rows, first, num_closed;
  bool open;
};

// Some rows, with the query heads that share one KV head. Matrix row m = row * group + head in group.
struct Task {
  i64 seq, first_row, num_rows, kv_head;  // first_row counts from the sequence's first
  i64 first_key, last_key;                // what any of the rows sees lies in [first_key, last_key)
  i64 first_segment, num_segments;
  float* partial;     // null = the task finishes; else where the sum of its segments goes
  const i64* tokens;  // null, or the batch rows of a group, which see all keys that seq has in the range
  Prefix prefix;      // of keys before first_key
};

// Bytes of working memory for one task, 64-byte aligned pieces laid end to end.
constexpr i64 scratch_bytes(i64 rows, i64 dim) {
  const i64 n = padded_rows(rows);
  return 4 * (2 * kTileKeys * dim           // packed keys, packed values
              + kBlockRows * kTileKeys * 2  // scores, weights
              + kTileKeys * dim             // keys on their way into another dtype
              + n * dim                     // queries
              + 2 * state_floats(n, dim)    // what came before, this segment
              + dim)                        // the key of zeros
         + 8 * n + 2 * 8 * kTileKeys + 16 * 64;  // visibility, pointers, alignment
}

struct Level {
  const char* name;
  void (*norm)(const Norm&, i64 first, i64 last);
  void (*rope)(const Rope&, i64 first, i64 last);
  void (*kv_write)(const KvWrite&, i64 first, i64 last);
  void (*gate)(const Gate&, i64 first, i64 last);
  void (*linear)(const Linear&, i64 first, i64 last);  // tiles of 16 outputs
  bool (*attend)(const Attention&, const Task&, char* scratch);        // false: a block id is out of range
  void (*merge)(const Attention&, const Task&);                   // of all partial states, and the end
  void (*enter)(const Attention&);  // on every thread before its first task, leave after its last
  void (*leave)(const Attention&);
};

extern const Level kBase;
#if defined(__x86_64__)
extern const Level kAvx2, kAvx512, kAmx;
#endif

}  // namespace quire
