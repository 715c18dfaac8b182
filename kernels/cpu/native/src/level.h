// All kernels, compiled for the instruction set of the including file: it says which by a pragma, names its namespace by
// LEVEL, and says once more what there is by HAS_AVX2 (FMA too), HAS_AVX512, HAS_VNNI and HAS_AMX (bf16 conversions too),
// because before version 13 GCC's pragma does not define its own macros in C++.
#include "tasks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace quire::LEVEL {

#include "simd.h"

#include "linear_args.h"
#include "tiles.h"

#include "kv_formats.h"

#include "matmul.h"

template <class F>
INLINE void with_dtype(i64 dtype, F f) {
  if (dtype == kBfloat16)
    f(bf16{});
  else
    f(float{});
}

#include "attention.h"
#include "integers.h"
#include "vectors.h"
#include "linear.h"
#include "rowwise.h"
#include "codes.h"
#include "embedding.h"
#include "routing.h"
#include "moe.h"

#include "ranking.h"

#include "noise.h"

#include "sampling.h"

#include "verify.h"

#include "draft.h"

#include "edits.h"
#include "logprobs.h"

#include "cache.h"

static i64 attention(const Attention&, Worker&);

// Each kernel behind the signature that all have.
#define NAMED(Arguments, function)                                            \
  {#function, sizeof(Arguments) / 8, [](const void* arguments, Worker& worker) { \
     return function(*(const Arguments*)arguments, worker);                    \
   }},
constexpr Named kNamed[] = {QUIRE_KERNELS(NAMED)};
#undef NAMED

// The numbers of kernels, as kNamed has them.
#define NUMBER(Arguments, function) kNumberOf_##function,
enum : i64 { QUIRE_KERNELS(NUMBER) };
#undef NUMBER

static Soon weights(i64 kernel, const void* arguments, i64 index, i64 threads) {
  if (kernel == kNumberOf_linear) return first_weights(*(const Linear*)arguments, index, threads);
  if (kernel == kNumberOf_linear_w8a8) return first_codes(*(const IntegerLinear*)arguments, index, threads);
  return {};
}

constexpr Level kLevel = {LEVEL_NAME, kNamed, weights, attend, merge, enter, leave};

static i64 attention(const Attention& a, Worker& w) { return run_attention(a, w, kLevel); }

}  // namespace quire::LEVEL
