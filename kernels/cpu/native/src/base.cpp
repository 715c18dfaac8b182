// The compiler's default instruction set, which runs everywhere.
#define LEVEL base
#define LEVEL_NAME "base"
#define HAS_AVX2 0
#define HAS_AVX512 0
#define HAS_VNNI 0
#define HAS_AMX 0
#include "level.h"

namespace quire {
const Level kBase = base::kLevel;
}
