// Attention's arguments, and the tasks that a step of it is cut into: shared by what plans them and what computes them.
#pragma once
#include "kernels.h"

namespace quire {

constexpr i64 kTileKeys = 64;      // keys per step of the online softmax: one 64-bit word of visibility per row
constexpr i64 kSegmentKeys = 512;  // keys that are summed before they are merged into what came before
constexpr i64 kBlockRows = 16;     // rows of a matrix tile

struct Batch {  // a prepared RaggedBatch; null tree_mask, window 0 = none
  const std::int32_t *cu_q, *seq_lens, *block_table;
  i64 table_width;
  const i64 *positions, *tree_mask;
  i64 num_seqs, num_tokens, block_size, window;
  // Sequences members[first_member[g]] to members[first_member[g + 1] - 1] begin with the same shared_keys[g] keys.
  const i64 *first_member, *members, *shared_keys;
  i64 num_groups;
  i64 step;  // tells this batch from all others that were prepared
};

struct Attention {
  i64 rows;
  const Batch* batch;
  i64 dtype, format;
  const void* q;
  i64 q_row, q_head;
  const void *k, *v;              // [num_blocks, block_size, kv_heads, width]
  const void *k_scale, *v_scale;  // null; [kv_heads] fp32; or [num_blocks, block_size, kv_heads] fp16
  i64 num_blocks, q_heads, kv_heads, dim;
  double scale, softcap;  // softcap 0 = none
  const float* sinks;
  void* out;   // [tokens, q_heads, dim]
  float* lse;  // [tokens, q_heads]
};

// Softmax in progress. Matrix row m is lane m % 16 of block m / 16; a block has o, the sums of weights * values, as
// [dim][16], and l, the sum of weights, and the exponent m that both are relative to (base 2), as [16].
struct StateView {
  float *o, *l, *m;
};

constexpr i64 padded_rows(i64 rows) { return (rows + kBlockRows - 1) / kBlockRows * kBlockRows; }
constexpr i64 state_floats(i64 rows, i64 dim) { return padded_rows(rows) * (dim + 2); }
static inline StateView state_at(float* p, i64 rows, i64 dim) {
  const i64 n = padded_rows(rows);
  return {p, p + n * dim, p + n * (dim + 1)};
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

// Tiles multiply 32 entries of a head at once; what is missing is zeros.
constexpr i64 padded_dim(i64 dim) { return (dim + 31) / 32 * 32; }

// Bytes of working memory for one task, 64-byte aligned pieces laid end to end.
constexpr i64 scratch_bytes(i64 rows, i64 dim) {
  const i64 n = padded_rows(rows), wide = padded_dim(dim);
  return 4 * (3 * kTileKeys * wide            // keys, values, and these on their way
              + 4 * kTileKeys * kBlockRows    // two blocks' scores and weights
              + n * wide + kBlockRows * wide  // queries, and some on their way
              + 2 * state_floats(n, dim)      // what came before, this segment
              + 4 * kTileKeys                 // scales
              + 2 * n                         // visibility
              + wide)                         // the key of zeros
         + 2 * 8 * kTileKeys + 20 * 64;       // pointers, alignment
}

i64 run_attention(const Attention&, Worker&, const Level&);

}  // namespace quire
