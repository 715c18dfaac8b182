// The C interface: which instruction set, which kernels, and calls of them.
#include <vector>

#include "pool.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quire {
namespace {

#if defined(__x86_64__)
// Linux hands a process the registers of AMX when it asks (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// The levels this processor runs, the best first.
const std::vector<const Level*>& levels() {
  static const std::vector<const Level*> usable = [] {
    std::vector<const Level*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool amx = vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
                     __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                     __builtin_cpu_supports("amx-int8");
    if (amx && may_use_tiles()) found.push_back(&kAmx);
    if (vnni) found.push_back(&kVnni);
    if (avx512) found.push_back(&kAvx512);
    if (avx2) found.push_back(&kAvx2);
#endif
    found.push_back(&kBase);
    return found;
  }();
  return usable;
}

const Level* chosen = levels().front();

}  // namespace
}  // namespace quire

using quire::i64;
#define API extern "C" __attribute__((visibility("default")))

// The name of level `index`, best first, or null behind the last.
API const char* quire_level(i64 index) {
  const auto& all = quire::levels();
  return index < (i64)all.size() ? all[index]->name : nullptr;
}

// Compute by level `index` from now on.
API void quire_use_level(i64 index) { quire::chosen = quire::levels()[index]; }

constexpr quire::i64 kKernels = [] {
  quire::i64 count = 0;
#define ONE(Arguments, function) ++count;
  QUIRE_KERNELS(ONE)
#undef ONE
  return count;
}();

// The name of kernel `index`, or null behind the last.
API const char* quire_kernel(i64 index) { return index < kKernels ? quire::kBase.kernels[index].name : nullptr; }

// How many 8-byte fields its arguments have.
API i64 quire_slots(i64 index) { return quire::kBase.kernels[index].slots; }

// One kernel, on so many threads. Returns a Status.
API i64 quire_call(i64 kernel, i64* slots, i64 threads) {
  const quire::Call call{kernel, slots};
  return quire::run_calls(*quire::chosen, &call, 1, threads);
}

// A tape: kernels one after another, all with so many rows. Returns a Status.
API i64 quire_run(const quire::Call* calls, i64 count, i64 threads, i64 rows) {
  for (i64 i = 0; i < count; ++i) calls[i].slots[0] = rows;
  return quire::run_calls(*quire::chosen, calls, count, threads);
}
