// The threads that compute: they wait for calls, run them one after another, and meet behind each.
#pragma once
#include "kernels.h"

namespace quire {

// A kernel and its arguments as 8-byte slots. Of a call that is `sized`, slot 0 becomes the rows of the run.
struct Call {
  i64 kernel;
  i64* slots;
  i64 sized;
};

// All calls in their order, on so many threads, this one among them. Returns the first Status that is not kDone: calls
// behind it are not made. Callers in other threads wait.
i64 run_calls(const Level&, const Call* calls, i64 count, i64 threads, i64 rows);

}  // namespace quire
