// All kernels, compiled for the instruction set of the including file: it says which by a pragma, names its namespace by
// LEVEL, and says once more what there is by HAS_AVX2 (FMA too), HAS_AVX512 and HAS_AMX (bf16 conversions too), because
// before version 13 GCC's pragma does not define its own macros in C++.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace quire::LEVEL {

#include "simd.h"

#include "matmul.h"

template <class F>
INLINE void with_dtype(i64 dtype, F f) {
  if (dtype == kBfloat16)
    f(bf16{});
  else
    f(float{});
}

#include "attention.h"
#include "linear.h"
#include "rowwise.h"

constexpr Level table(const char* name) {
  return {name, norm, rope, kv_write, gate, linear, attend, merge, enter, leave};
}

}  // namespace quire::LEVEL
