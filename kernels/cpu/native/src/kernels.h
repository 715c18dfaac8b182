// What the C interface and the kernels of each instruction set share: how a kernel is called, and the list of kernels.
// No standard library beyond <cstdint>: inline functions of a header compiled for AVX-512 must never be the ones
// that the linker keeps for everybody.
#pragma once
#include <cstdint>

namespace quire {

using i64 = std::int64_t;

struct bf16 {
  std::uint16_t bits;
};

enum Dtype : i64 { kFloat32 = 0, kBfloat16 = 1 };  // the codes that library.py passes

// Of keys and values in the cache, plain ones by their Dtype's code; library.py passes these too.
enum KvFormat : i64 { kKvFloat32, kKvBfloat16, kKvFloat16, kKvFp8, kKvInt8, kKvInt4 };

enum Status : i64 { kDone = 0, kOutOfRange = 1, kOutOfMemory = 2 };

// Every kernel by name, one line each: X(type of its arguments, function). The arguments are a struct of 8-byte fields
// (i64, double, pointers; strides in elements), of which the first is `rows`; library.py packs the same.
#define QUIRE_KERNELS(X)       \
  X(Norm, norm)                \
  X(Rope, rope)                \
  X(RopeKvWrite, rope_kv_write) \
  X(Move, move)                \
  X(Hadamard, hadamard)        \
  X(Gate, gate)                \
  X(SoftCap, soft_cap)         \
  X(AddResidual, add_residual) \
  X(AddGated, add_gated)       \
  X(Gather, gather)            \
  X(Route, route)              \
  X(QuantizeRows, quantize_rows) \
  X(NormCodes, norm_codes)     \
  X(GateCodes, gate_codes)     \
  X(Linear, linear)            \
  X(Moe, moe)                  \
  X(Greedy, greedy)            \
  X(Sample, sample)            \
  X(Probabilities, probabilities) \
  X(DrawChildren, draw_children) \
  X(Verify, verify)            \
  X(TokenLogprobs, token_logprobs) \
  X(ProcessLogits, process_logits) \
  X(IntegerLinear, linear_w8a8) \
  X(Attention, attention)

// One of the threads that run a kernel together: all of them call the same function with the same arguments.
class Worker {
 public:
  i64 index, count;  // which one, of how many

  struct Range {
    i64 first, last;
  };

  // The next `grain` of n units, whoever asks; false when all are taken. A kernel with several loops numbers them by
  // `phase`, 0 to kPhases - 1, and has a barrier between them.
  bool next(Range& range, i64 n, i64 grain, i64 phase = 0) {
    range.first = take(grain, phase);
    range.last = range.first + grain < n ? range.first + grain : n;
    return range.first < n;
  }

  void barrier();            // until all have come
  char* scratch(i64 bytes);  // the thread's own memory, on a 64-byte boundary, contents arbitrary; null = there is none

  static constexpr i64 kPhases = 4;

 private:
  i64 take(i64 grain, i64 phase);
};

// Units that make a piece of some thousand elements: taking a piece costs 20 ns, and the last one is waited for.
constexpr i64 piece(i64 elements_per_unit) {
  constexpr i64 kElements = 8192;
  return elements_per_unit >= kElements ? 1 : kElements / (elements_per_unit > 0 ? elements_per_unit : 1);
}

using Kernel = i64 (*)(const void* args, Worker&);  // returns a Status

// Memory that a kernel will read first.
struct Soon {
  const char* at;
  i64 lines;  // of 64 bytes
};

struct Named {
  const char* name;
  i64 slots;  // fields of the arguments
  Kernel run;
};

struct Attention;
struct Task;

struct Level {
  const char* name;
  const Named* kernels;  // in the order of QUIRE_KERNELS
  // The weights that worker `index` of a kernel will most likely begin with; nothing for kernels without weights.
  Soon (*weights)(i64 kernel, const void* args, i64 index, i64 threads);
  // Attention's parts, which schedule.cpp puts together.
  bool (*attend)(const Attention&, const Task&, char* scratch);  // false: a block id is out of range
  void (*merge)(const Attention&, const Task&);                  // of all partial states, and the end
  void (*enter)(const Attention&);  // on every thread before its first task, leave after its last
  void (*leave)(const Attention&);
};

extern const Level kBase;
#if defined(__x86_64__)
extern const Level kAvx2, kAvx512, kVnni, kAmx;
#endif

}  // namespace quire
