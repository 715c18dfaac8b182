// The C interface: which instruction set, how much per thread. Raw pointers and integers in; strides in elements.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

#if defined(_OPENMP)
#include <omp.h>
#endif
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
    const bool amx = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
                     __builtin_cpu_supports("amx-bf16");
    if (amx && may_use_tiles()) found.push_back(&kAmx);
    if (avx512) found.push_back(&kAvx512);
    if (avx2) found.push_back(&kAvx2);
#endif
    found.push_back(&kBase);
    return found;
  }();
  return usable;
}

const Level* chosen = levels().front();

i64 num_threads() {
#if defined(_OPENMP)
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// f(first, last) over the rows: on the calling thread alone if they have fewer elements than a fork is worth.
template <class F>
void over_rows(i64 rows, i64 elements_per_row, F f) {
  constexpr i64 kWorthAFork = 65536;  // elements: 10 us of the cheapest kernel; waking a thread takes 3 to 5
  const i64 threads = rows * elements_per_row < kWorthAFork ? 1 : num_threads();
  if (threads == 1) {
    f(0, rows);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (i64 t = 0; t < threads; ++t) f(rows * t / threads, rows * (t + 1) / threads);
}

class Buffer {
 public:
  ~Buffer() { std::free(data_); }

  // At least so many bytes, contents arbitrary; null if there is no memory.
  char* get(i64 bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = (char*)std::aligned_alloc(64, size_);
      if (!data_) size_ = 0;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  i64 size_ = 0;
};

enum Status : i64 { kDone = 0, kOutOfRange = 1, kOutOfMemory = 2 };

#include "tasks.h"

thread_local Buffer scratch;
thread_local Schedule schedule;

// The prefixes, and when all of them are done, the tasks that go on from what they left.
i64 run_tasks(const Attention& a, const std::vector<Task>& prefixes, const std::vector<Task>& list, i64 threads) {
  const i64 bytes = scratch_bytes(max_task_rows(a) * group_heads(a), a.dim);
  i64 status = kDone;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* const memory = scratch.get(bytes);
    const auto run = [&](const Task& task) {
      const i64 result = !memory ? kOutOfMemory : chosen->attend(a, task, memory) ? kDone : kOutOfRange;
      if (result != kDone) {
#pragma omp atomic write
        status = result;
      }
    };
    chosen->enter(a);
    if (!prefixes.empty()) {
#pragma omp for schedule(dynamic, 1)
      for (std::size_t i = 0; i < prefixes.size(); ++i) run(prefixes[i]);
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (std::size_t i = 0; i < list.size(); ++i) run(list[i]);
    chosen->leave(a);
  }
  return status;
}

// Rows behind the last sequence see nothing.
void blank_padding(const Attention& a) {
  const Batch& b = a.batch;
  const i64 first = b.cu_q[b.num_seqs], row_bytes = a.q_heads * a.dim * (a.dtype == kBfloat16 ? 2 : 4);
  std::memset((char*)a.out + first * row_bytes, 0, (b.num_tokens - first) * row_bytes);
  for (i64 i = first * a.q_heads; i < b.num_tokens * a.q_heads; ++i)
    a.lse[i] = a.sinks ? a.sinks[i % a.q_heads] : -std::numeric_limits<float>::infinity();
}

i64 attend(const Attention& a) {
  // Keys x blocks of 16 rows, about 10 us of them with AMX; a fork costs 3 to 5, and more where cores are busy.
  constexpr i64 kWorthAFork = 2048;
  if (a.batch.num_tokens == 0) return kDone;
  blank_padding(a);
  Schedule& todo = schedule;
  if (const i64 status = list_tasks(a, num_threads(), todo); status != kDone) return status;
  const i64 threads = work(a, todo.prefixes) + work(a, todo.tasks) < kWorthAFork ? 1 : num_threads();
  const bool few = (i64)todo.tasks.size() < 2 * threads && threads > 1;
  if (!few) return run_tasks(a, todo.prefixes, todo.tasks, threads);
  if (!split(a, todo)) return kOutOfMemory;
  if (const i64 status = run_tasks(a, todo.prefixes, todo.pieces, threads); status != kDone) return status;
  std::size_t piece = 0;
  for (Task& t : todo.tasks) {
    if (t.num_segments > 1) {
      t.partial = todo.pieces[piece].partial;
      chosen->merge(a, t);
    }
    piece += std::max<i64>(1, t.num_segments);
  }
  return kDone;
}

}  // namespace
}  // namespace quire

using quire::i64;
#define API extern "C" __attribute__((visibility("default")))

API i64 quire_interface() { return quire::kInterface; }

// The name of level `index`, best first, or null behind the last.
API const char* quire_level(i64 index) {
  const auto& all = quire::levels();
  return index < (i64)all.size() ? all[index]->name : nullptr;
}

// Compute by level `index` from now on.
API void quire_use_level(i64 index) { quire::chosen = quire::levels()[index]; }

API void quire_norm(i64 dtype, i64 weight_dtype, const void* x, i64 rows, i64 heads, i64 x_row, i64 x_head, i64 dim,
                    void* residual, const void* weight, float eps, float offset, void* out) {
  const quire::Norm n{dtype, weight_dtype, x, heads, x_row, x_head, dim, residual, weight, eps, offset, out};
  quire::over_rows(rows * heads, dim, [&](i64 first, i64 last) { quire::chosen->norm(n, first, last); });
}

API i64 quire_rope(i64 dtype, void* q, void* k, i64 rows, i64 q_heads, i64 k_heads, i64 q_row, i64 q_head, i64 k_row,
                   i64 k_head, i64 dim, const i64* positions, const float* table, i64 table_rows, i64 rotary_dim,
                   i64 interleaved) {
  for (i64 t = 0; t < rows; ++t)
    if (positions[t] < 0 || positions[t] >= table_rows) return quire::kOutOfRange;
  const quire::Rope r{dtype, q,     k,         q_heads, k_heads,    q_row,           q_head,
                      k_row, k_head, positions, table,   rotary_dim, interleaved != 0};
  quire::over_rows(rows, (q_heads + k_heads) * dim, [&](i64 first, i64 last) { quire::chosen->rope(r, first, last); });
  return quire::kDone;
}

API i64 quire_kv_write(i64 dtype, i64 cache_dtype, const void* k, const void* v, i64 rows, i64 k_row, i64 k_head,
                       i64 v_row, i64 v_head, i64 heads, i64 dim, void* k_cache, void* v_cache, i64 num_slots,
                       const i64* slots) {
  for (i64 t = 0; t < rows; ++t)
    if (slots[t] < 0 || slots[t] >= num_slots) return quire::kOutOfRange;
  const quire::KvWrite w{dtype,  cache_dtype, k,   v,       k_row,   k_head, v_row,
                         v_head, heads,       dim, k_cache, v_cache, slots};
  quire::over_rows(rows, heads * dim, [&](i64 first, i64 last) { quire::chosen->kv_write(w, first, last); });
  return quire::kDone;
}

API void quire_gate(i64 dtype, const void* x, i64 rows, i64 x_row, i64 width, void* out, i64 gelu) {
  const quire::Gate g{dtype, x, x_row, width, out, gelu != 0};
  // An exponential and a division make an element worth several of a norm's.
  quire::over_rows(rows, 4 * width, [&](i64 first, i64 last) { quire::chosen->gate(g, first, last); });
}

API void quire_linear(const void* x, const void* weight, const float* bias, i64 rows, i64 inputs, i64 outputs,
                      void* out) {
  if (rows == 0) return;  // a matrix tile has at least one
  const quire::Linear l{x, weight, bias, rows, inputs, outputs, out};
  quire::over_rows((outputs + 15) / 16, 16 * inputs, [&](i64 first, i64 last) { quire::chosen->linear(l, first, last); });
}

API i64 quire_attention(const quire::Batch* batch, i64 dtype, i64 cache_dtype, const void* q, i64 q_row, i64 q_head,
                        const void* k, const void* v, i64 num_blocks, i64 q_heads, i64 kv_heads, i64 dim, float scale,
                        float softcap, const float* sinks, void* out, float* lse) {
  return quire::attend({*batch,     dtype,   cache_dtype, q,   q_row, q_head,  k,     v,   num_blocks,
                        q_heads, kv_heads, dim, scale, softcap, sinks, out, lse});
}
