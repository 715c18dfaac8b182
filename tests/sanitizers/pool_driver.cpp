// Uses the pool as the engine does, and worse: several callers, lists of calls, phases with barriers between, failures
// in the middle, more and fewer threads from run to run, a fork. Linked with pool.cpp alone; every result is checked.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "pool.h"

using namespace quire;

namespace {

void require(bool held, const char* what) {
  if (held) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// out[i] += i, each by whoever takes it.
struct Count {
  i64 rows;
  i64* out;
};

i64 count(const void* arguments, Worker& w) {
  const Count& c = *(const Count*)arguments;
  for (Worker::Range r; w.next(r, c.rows, 3);)
    for (i64 i = r.first; i < r.last; ++i) c.out[i] += i;
  return kDone;
}

// Phase after phase reads what the phase before wrote, whoever did.
struct Shift {
  i64 rows;
  i64* out;
};

i64 shift(const void* arguments, Worker& w) {
  const Shift& s = *(const Shift*)arguments;
  for (i64 phase = 0; phase < Worker::kPhases; ++phase) {
    i64* const from = s.out + phase * s.rows;
    for (Worker::Range r; w.next(r, s.rows, 1, phase);)
      for (i64 i = r.first; i < r.last; ++i) from[s.rows + i] = from[(i + 1) % s.rows] + 1;
    if (phase + 1 < Worker::kPhases) w.barrier();
  }
  return kDone;
}

// Sums by each thread in memory of its own, which grows from call to call.
struct Sum {
  i64 rows;
  const i64* in;
  i64* sums;  // one per row
  i64 bytes;
};

i64 sum(const void* arguments, Worker& w) {
  const Sum& s = *(const Sum*)arguments;
  char* const memory = w.scratch(s.bytes);
  if (!memory) return kOutOfMemory;
  for (Worker::Range r; w.next(r, s.rows, 1);) {
    i64* const own = (i64*)memory;
    own[0] = 0;
    own[s.bytes / 8 - 1] = s.in[r.first];
    for (i64 i = 0; i < 100; ++i) own[0] += own[s.bytes / 8 - 1];
    s.sums[r.first] = own[0];
  }
  return kDone;
}

// Fails where the row is `bad`.
struct Check {
  i64 rows, bad;
};

i64 check(const void* arguments, Worker& w) {
  const Check& c = *(const Check*)arguments;
  i64 status = kDone;
  for (Worker::Range r; w.next(r, c.rows, 1);)
    if (r.first == c.bad) status = kOutOfRange;
  return status;
}

const Named kNamed[] = {{"count", 2, count}, {"shift", 2, shift}, {"sum", 4, sum}, {"check", 2, check}};
// A call's arguments stand for the weights that are fetched while a thread waits.
Soon weights(i64, const void* arguments, i64, i64) { return {(const char*)arguments, 1}; }

const Level kLevel = {"driver", kNamed, weights, nullptr, nullptr, nullptr, nullptr};
enum : i64 { kCount, kShift, kSum, kCheck };

constexpr i64 kRows = 97;

// A list of all kernels, three times over; `bad` < 0: none fails.
void one_run(i64 threads, i64 rows, i64 bad) {
  std::vector<i64> counted(kRows), shifted((Worker::kPhases + 1) * kRows), sums(kRows);
  std::vector<Count> counts;
  std::vector<Sum> totals;
  std::vector<Call> calls;
  Shift shifting{rows, shifted.data()};
  Check checking{rows, bad};
  counts.reserve(3);
  totals.reserve(3);
  for (i64 i = 0; i < 3; ++i) {
    counts.push_back({rows, counted.data()});
    totals.push_back({rows, counted.data(), sums.data(), 8 * (2 + 300 * i * threads)});
    calls.push_back({kCount, (i64*)&counts[i]});
    calls.push_back({kShift, (i64*)&shifting});
    calls.push_back({kSum, (i64*)&totals[i]});
    calls.push_back({kCheck, (i64*)&checking});
  }
  const i64 status = run_calls(kLevel, calls.data(), calls.size(), threads);
  const bool fails = bad >= 0 && bad < rows;
  require(status == (fails ? kOutOfRange : kDone), "the status of a run");
  const i64 rounds = fails ? 1 : 3;  // calls behind one that fails are not made
  for (i64 i = 0; i < kRows; ++i) {
    require(counted[i] == (i < rows ? rounds * i : 0), "every row once per call, and no row beyond");
    require(sums[i] == (i < rows ? 100 * rounds * i : 0), "a kernel sees what the one before wrote");
    if (i < rows)
      require(shifted[Worker::kPhases * rows + i] == Worker::kPhases, "a phase sees what the one before wrote");
  }
}

void callers() {
  std::vector<std::thread> all;
  for (i64 caller = 0; caller < 4; ++caller)
    all.emplace_back([caller] {
      for (i64 i = 0; i < 60; ++i) {
        const i64 threads = 1 + (i + caller) % 4, rows = (31 * i + 7 * caller) % (kRows + 1);
        one_run(threads, rows, i % 5 == 4 ? i : -1);
      }
    });
  for (auto& one : all) one.join();
}

// Pauses of all lengths between runs: threads are caught spinning, resting, falling asleep and sleeping.
void pauses() {
  for (i64 i = 0; i < 40; ++i) {
    std::this_thread::sleep_for(std::chrono::microseconds(i * i));
    one_run(1 + i % 4, kRows, -1);
  }
}

void fork_one() {
  const pid_t child = fork();
  require(child >= 0, "fork");
  if (child == 0) {
    one_run(3, kRows, -1);
    _exit(7);
  }
  int status = 0;
  require(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 7, "a forked child works");
  one_run(3, kRows, -1);
}

}  // namespace

int main() {
  one_run(1, 0, -1);
  for (i64 threads : {1, 4, 2, 3, 1, 4}) one_run(threads, kRows, -1);
  for (i64 bad : {0, 50, 96}) one_run(4, kRows, bad);
  callers();
  pauses();
  fork_one();
  std::puts("done");
}
