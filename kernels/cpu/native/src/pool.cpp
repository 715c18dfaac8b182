#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "buffer.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__unix__)
#include <pthread.h>
#include <sched.h>
#endif

namespace quire {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Looks until `ready`: for some microseconds without a rest, then giving the core to whoever wants it each time (on a
// busy machine the thread that is waited for may need this very core). False after `rests` of these.
template <class F>
bool watch(i64 rests, F ready) {
  constexpr i64 kLooks = 512;  // about 20 us
  for (i64 i = 0; i < kLooks; ++i) {
    if (ready()) return true;
    pause();
  }
  for (i64 i = 0; i < rests; ++i) {
    if (ready()) return true;
#if defined(__unix__)
    sched_yield();
#else
    std::this_thread::yield();
#endif
  }
  return ready();
}

constexpr i64 kForEver = INT64_MAX;

struct Job {
  const Level* level;
  const Call* calls;
  i64 count, threads;
};

class Pool {
 public:
  i64 run(Job job) {
    std::lock_guard<std::mutex> alone(callers_);
    failure_.store(kNone, std::memory_order_relaxed);
    for (auto& set : taken_)
      for (auto& counter : set) counter.at.store(0, std::memory_order_relaxed);
    job.threads = hire(job.threads);
    if (job.threads > 1) wake(job);
    work(job, 0);
    if (job.threads > 1) watch(kForEver, [&] { return working_.load(std::memory_order_acquire) == 0; });
    const i64 failure = failure_.load(std::memory_order_relaxed);
    return failure == kNone ? kDone : failure % kStatuses;
  }

  // Until all have come; whoever waits fetches what it will read next, a few lines at a look.
  void barrier(i64 threads, Soon soon = {}) {
    if (threads == 1) return;
    const i64 round = rounds_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      rounds_.store(round + 1, std::memory_order_release);
      return;
    }
    watch(kForEver, [&] {
      constexpr i64 kLines = 4;
      for (i64 i = 0; i < kLines && soon.lines > 0; ++i, --soon.lines, soon.at += 64) __builtin_prefetch(soon.at, 0, 2);
      return rounds_.load(std::memory_order_acquire) != round;
    });
  }

  i64 take(i64 grain, i64 phase) { return taken_[set_][phase].at.fetch_add(grain, std::memory_order_relaxed); }

 private:
  // How many threads there are of those wanted: fewer where the system gives no more.
  i64 hire(i64 wanted) {
    if (wanted > kMaxThreads) wanted = kMaxThreads;
    try {
      for (; num_threads_ < wanted; ++num_threads_)
        std::thread([this, index = num_threads_, seen = jobs_.load()] { live(index, seen); }).detach();
    } catch (const std::system_error&) {
    }
    return num_threads_ < wanted ? num_threads_ : wanted;
  }

  void wake(const Job& job) {
    job_ = job;
    working_.store(job.threads - 1, std::memory_order_relaxed);
    jobs_.store((jobs_.load() / kMaxThreads + 1) * kMaxThreads + job.threads - 1);
    if (sleepers_.load() > 0) {
      {
        std::lock_guard<std::mutex> lock(sleep_);
      }
      wakeup_.notify_all();
    }
  }

  [[noreturn]] void live(i64 index, i64 seen) {
    constexpr i64 kRests = 64;  // between the steps of a small model; then it sleeps
    for (;;) {
      const auto called = [&] { return jobs_.load() != seen; };
      if (!watch(kRests, called)) {
        std::unique_lock<std::mutex> lock(sleep_);
        sleepers_.fetch_add(1);
        wakeup_.wait(lock, called);
        sleepers_.fetch_sub(1);
      }
      seen = jobs_.load();
      if (index > seen % kMaxThreads) continue;  // nobody waits for this thread: job_ may be the next one's already
      const Job job = job_;
      work(job, index);
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  void work(const Job& job, i64 index);

  struct alignas(64) Counter {
    std::atomic<i64> at{0};
  };

  std::mutex callers_, sleep_;
  std::condition_variable wakeup_;
  Job job_{};
  // The number of the last job, and in the digits below kMaxThreads how many threads it has beside the caller.
  static constexpr i64 kMaxThreads = 1 << 16;
  std::atomic<i64> jobs_{0}, sleepers_{0}, working_{0};
  i64 num_threads_ = 1;  // with the caller's
  alignas(64) std::atomic<i64> arrived_{0};
  alignas(64) std::atomic<i64> rounds_{0};
  // The call that failed, and how: call * kStatuses + Status. Whoever is behind that call's barrier ends there, while a
  // slower thread still has to come to the barrier before.
  static constexpr i64 kStatuses = 8, kNone = INT64_MAX;
  alignas(64) std::atomic<i64> failure_{kNone};
  // Two sets of counters in turn: while one call uses its set, the other's is made ready for the next.
  Counter taken_[2][Worker::kPhases];
  static thread_local i64 set_;
};

thread_local i64 Pool::set_ = 0;
thread_local Buffer scratch;

Pool* the_pool = nullptr;

// A child of fork() has none of the threads.
void forget_pool() { the_pool = nullptr; }

// Never destroyed: its threads may outlive everything else.
Pool& pool() {
  static std::mutex making;
  std::lock_guard<std::mutex> lock(making);
  if (!the_pool) {
    the_pool = new Pool;
#if defined(__unix__)
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
#endif
  }
  return *the_pool;
}

// Of the first call behind call i that has weights.
Soon next_weights(const Job& job, i64 i, i64 index) {
  constexpr i64 kLook = 4;  // calls: a norm, a rotation or attention stand between two products
  for (i64 j = i + 1; j < job.count && j <= i + kLook; ++j)
    if (const Soon soon = job.level->weights(job.calls[j].kernel, job.calls[j].slots, index, job.threads); soon.lines)
      return soon;
  return {};
}

void Pool::work(const Job& job, i64 index) {
  Worker worker{index, job.threads};
  for (i64 i = 0; i < job.count; ++i) {
    set_ = i & 1;
    const i64 status = job.level->kernels[job.calls[i].kernel].run(job.calls[i].slots, worker);
    if (status != kDone) failure_.store(i * kStatuses + status, std::memory_order_relaxed);
    barrier(job.threads, next_weights(job, i, index));
    if (failure_.load(std::memory_order_relaxed) / kStatuses <= i) return;
    if (index == 0)
      for (auto& counter : taken_[i & 1]) counter.at.store(0, std::memory_order_relaxed);
  }
}

}  // namespace

void Worker::barrier() { the_pool->barrier(count); }
char* Worker::scratch(i64 bytes) { return quire::scratch.get(bytes); }
i64 Worker::take(i64 grain, i64 phase) { return the_pool->take(grain, phase); }

i64 run_calls(const Level& level, const Call* calls, i64 count, i64 threads) {
  return pool().run({&level, calls, count, threads});
}

}  // namespace quire
