// AVX-512 with products of bytes (VNNI): Cascade Lake, Ice Lake, Zen 4 and later.
#if defined(__x86_64__)
#pragma GCC target("avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define LEVEL vnni
#define LEVEL_NAME "vnni"
#define HAS_AVX2 1
#define HAS_AVX512 1
#define HAS_VNNI 1
#define HAS_AMX 0
#include "level.h"

namespace quire {
const Level kVnni = vnni::kLevel;
}
#endif
