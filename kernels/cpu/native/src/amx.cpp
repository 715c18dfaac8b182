// AMX with bf16 and int8 tiles: Sapphire Rapids and later.
#if defined(__x86_64__)
#pragma GCC target( \
    "amx-tile,amx-bf16,amx-int8,avx512bf16,avx512vnni,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define LEVEL amx
#define LEVEL_NAME "amx"
#define HAS_AVX2 1
#define HAS_AVX512 1
#define HAS_VNNI 1
#define HAS_AMX 1
#include "level.h"

namespace quire {
const Level kAmx = amx::kLevel;
}
#endif
