// AVX-512 F, BW, DQ and VL: Skylake servers and later.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define LEVEL avx512
#define LEVEL_NAME "avx512"
#define HAS_AVX2 1
#define HAS_AVX512 1
#define HAS_VNNI 0
#define HAS_AMX 0
#include "level.h"

namespace quire {
const Level kAvx512 = avx512::kLevel;
}
#endif
