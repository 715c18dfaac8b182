// The compiler's default instruction set, which runs everywhere.
#define LEVEL base
#include "level.h"

namespace quire {
const Level kBase = base::table("base");
}
