// AVX2 and FMA: Haswell, Zen and later.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define LEVEL avx2
#define LEVEL_NAME "avx2"
#define HAS_AVX2 1
#define HAS_AVX512 0
#define HAS_VNNI 0
#define HAS_AMX 0
#include "level.h"

namespace quire {
const Level kAvx2 = avx2::kLevel;
}
#endif
