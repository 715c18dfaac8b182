// The threads that compute: they wait for calls, run them one after another, and meet behind each.
#pragma once
#include "kernels.h"

namespace quire {

struct Call {  // a kernel and its arguments as 8-byte slots, of which the first is the rows
  i64 kernel;
  i64* slots;
};

// All calls in their order, on so many threads, this one among them. Returns the first Status that is not kDone: calls
// behind it are not made. Callers in other threads wait.
i64 run_calls(const Level&, const Call* calls, i64 count, i64 threads);

}  // namespace quire
