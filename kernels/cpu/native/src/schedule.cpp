// A step's attention as tasks: what each goes through, and where the parts of one row's sum go.
//
//     groups of sequences ─▶ runs of their rows ─▶ prefix tasks ─states─┐
//     rows of each sequence ───────────────────────────────────────▶ tasks ─▶ few? a piece per segment ─▶ merge
//
// A group's prefix is gone through once per run instead of once per sequence (Hydragen, Juravsky et al. 2024, section
// 3.1), and its rows go on from the states that this leaves. All of this decides who computes what, never a bit of it.

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "buffer.h"
#include "tasks.h"

namespace quire {
namespace {

i64 group_heads(const Attention& a) { return a.q_heads / a.kv_heads; }

i64 max_task_rows(const Attention& a) {
  // Keys and values are packed once for them; their queries, weights and sums take 0.4 of a 2 MiB L2. Twice as
  // many gain nothing for a chunk of 512 tokens behind 1,500, 14 heads on 2, and lose 15 % for one of 64 behind 1,000.
  constexpr i64 kMatrixRows = 512;
  i64 rows = 1;
  while (2 * rows * group_heads(a) <= kMatrixRows) rows *= 2;
  return rows;
}

Task over_keys(Task t, i64 first_key, i64 last_key) {
  t.first_key = first_key;
  t.last_key = last_key;
  t.first_segment = first_key / kSegmentKeys;
  t.num_segments = first_key < last_key ? (last_key + kSegmentKeys - 1) / kSegmentKeys - t.first_segment : 0;
  return t;
}

// Some rows of a sequence, on the keys they see from `low` on.
Task rows_of(const Batch& b, i64 seq, i64 first, i64 rows, i64 low) {
  const i64 start = b.cu_q[seq] + first, end = b.seq_lens[seq];
  i64 high = end - (b.cu_q[seq + 1] - b.cu_q[seq]) + first + rows;
  for (i64 r = start; b.tree_mask && r < start + rows; ++r)
    if (b.tree_mask[r]) high = end;
  if (b.window) {
    i64 lowest = end;
    for (i64 r = start; r < start + rows; ++r) lowest = std::min(lowest, b.positions[r] - b.window + 1);
    low = std::max(low, lowest);
  }
  Task t{};
  t.seq = seq;
  t.first_row = first;
  t.num_rows = rows;
  return over_keys(t, low, high);
}

struct Run {  // rows of one group that a task takes together
  i64 group, seq, keys;
  const i64* tokens;
  i64 num_rows, num_closed, num_states;
  float* states;  // of KV head 0; the others' follow
};

struct Follower {  // rows of a run on the keys behind its prefix
  Task task;
  std::size_t run;
};

struct Schedule {
  std::vector<Task> prefixes, tasks, pieces;
  std::vector<Run> runs;
  std::vector<Follower> followers;
  std::vector<i64> tokens;
  std::vector<char> grouped;  // per sequence
  Buffer states, partials;
};

// Where a run's states for a KV head begin.
float* states_of(const Attention& a, const Run& r, i64 head) {
  return r.states + head * r.num_states * state_floats(r.num_rows * group_heads(a), a.dim);
}

bool add_member(const Attention& a, i64 group, i64 seq, Schedule& to) {
  const Batch& b = *a.batch;
  const i64 keys = b.shared_keys[group] / kTileKeys * kTileKeys;  // a tile is summed at once
  if (keys == 0) return true;
  if (seq < 0 || seq >= b.num_seqs || to.grouped[seq]) return false;
  const i64 count = b.cu_q[seq + 1] - b.cu_q[seq], step = max_task_rows(a);
  if (keys > b.seq_lens[seq] - count) return false;
  to.grouped[seq] = 1;
  for (i64 first = 0; first < count; first += step) {
    const i64 rows = std::min(step, count - first);
    if (to.runs.empty() || to.runs.back().group != group || to.runs.back().num_rows + rows > step)
      to.runs.push_back({group, seq, keys, to.tokens.data() + to.tokens.size(), 0, 0, 0, nullptr});
    Run& run = to.runs.back();
    Task t = rows_of(b, seq, first, rows, keys);
    t.prefix.first = run.num_rows * group_heads(a);
    to.followers.push_back({t, to.runs.size() - 1});
    run.num_rows += rows;
    for (i64 r = 0; r < rows; ++r) to.tokens.push_back(b.cu_q[seq] + first + r);
  }
  return true;
}

// Memory for what the runs' tasks leave: one state for all whole segments, one for each where there would be too few
// tasks to go round, and one for the rest.
bool place_states(const Attention& a, i64 threads, Schedule& to) {
  const bool few = (i64)to.runs.size() * a.kv_heads < 2 * threads;
  i64 floats = 0;
  for (Run& r : to.runs) {
    const i64 whole = r.keys / kSegmentKeys;
    r.num_closed = few ? whole : std::min<i64>(whole, 1);
    r.num_states = r.num_closed + (r.keys % kSegmentKeys != 0);
    floats += a.kv_heads * r.num_states * state_floats(r.num_rows * group_heads(a), a.dim);
  }
  float* next = (float*)to.states.get(4 * floats);
  if (!next) return false;
  for (Run& r : to.runs) {
    r.states = next;
    next = states_of(a, r, a.kv_heads);
  }
  return true;
}

void add_prefix(const Attention& a, const Run& r, std::vector<Task>& list) {
  const i64 whole = r.keys / kSegmentKeys * kSegmentKeys;
  Task t{};
  t.seq = r.seq;
  t.num_rows = r.num_rows;
  t.tokens = r.tokens;
  for (; t.kv_head < a.kv_heads; ++t.kv_head) {
    t.partial = states_of(a, r, t.kv_head);
    for (i64 i = 0; i < r.num_states; ++i) {
      const i64 low = i < r.num_closed ? i * kSegmentKeys : whole;
      const i64 high = i < r.num_closed - 1 ? low + kSegmentKeys : i < r.num_closed ? whole : r.keys;
      list.push_back(over_keys(t, low, high));
      t.partial += state_floats(r.num_rows * group_heads(a), a.dim);
    }
  }
}

i64 list_groups(const Attention& a, i64 threads, Schedule& to) {
  const Batch& b = *a.batch;
  to.grouped.assign(b.num_seqs, 0);
  to.prefixes.clear();
  to.runs.clear();
  to.followers.clear();
  to.tokens.clear();
  to.tokens.reserve(b.num_tokens);  // runs point into it
  for (i64 g = 0; g < b.num_groups; ++g)
    for (i64 i = b.first_member[g]; i < b.first_member[g + 1]; ++i)
      if (!add_member(a, g, b.members[i], to)) return kOutOfRange;
  if (to.runs.empty()) return kDone;
  if (!place_states(a, threads, to)) return kOutOfMemory;
  for (const Run& r : to.runs) add_prefix(a, r, to.prefixes);
  for (const Follower& f : to.followers) {
    const Run& r = to.runs[f.run];
    for (Task t = f.task; t.kv_head < a.kv_heads; ++t.kv_head) {
      t.prefix = {states_of(a, r, t.kv_head), r.num_rows * group_heads(a), t.prefix.first, r.num_closed,
                  r.num_closed < r.num_states};
      to.tasks.push_back(t);
    }
  }
  return kDone;
}

// One task per KV head and run of rows, the longest (a chunk's last rows) first.
i64 list_tasks(const Attention& a, i64 threads, Schedule& to) {
  const Batch& b = *a.batch;
  const i64 step = max_task_rows(a);
  to.tasks.clear();
  for (i64 s = 0; s < b.num_seqs; ++s)
    if (b.seq_lens[s] > b.table_width * b.block_size) return kOutOfRange;
  if (const i64 status = list_groups(a, threads, to); status != kDone) return status;
  for (i64 s = b.num_seqs - 1; s >= 0; --s) {
    const i64 count = to.grouped[s] ? 0 : b.cu_q[s + 1] - b.cu_q[s];
    for (i64 first = (count - 1) / step * step; count > 0 && first >= 0; first -= step)
      for (Task t = rows_of(b, s, first, std::min(step, count - first), 0); t.kv_head < a.kv_heads; ++t.kv_head)
        to.tasks.push_back(t);
  }
  return kDone;
}

// Where there are too few tasks to go round, each segment becomes one; what they leave is merged afterwards.
bool split(const Attention& a, Schedule& to) {
  i64 floats = 0;
  for (const Task& t : to.tasks)
    floats += t.num_segments > 1 ? t.num_segments * state_floats(t.num_rows * group_heads(a), a.dim) : 0;
  float* next = (float*)to.partials.get(4 * floats);
  if (floats && !next) return false;
  to.pieces.clear();
  for (const Task& t : to.tasks) {
    if (t.num_segments < 2) {
      to.pieces.push_back(t);
      continue;
    }
    for (i64 s = 0; s < t.num_segments; ++s) {
      to.pieces.push_back(t);
      Task& piece = to.pieces.back();
      piece.first_segment += s;
      piece.num_segments = 1;
      piece.partial = next;
      if (s > 0) piece.prefix = {};
      next += state_floats(t.num_rows * group_heads(a), a.dim);
    }
  }
  return true;
}

// Rows behind the last sequence see nothing.
void blank_padding(const Attention& a) {
  const Batch& b = *a.batch;
  const i64 first = b.cu_q[b.num_seqs], row_bytes = a.q_heads * a.dim * (a.dtype == kBfloat16 ? 2 : 4);
  std::memset((char*)a.out + first * row_bytes, 0, (b.num_tokens - first) * row_bytes);
  for (i64 i = first * a.q_heads; i < b.num_tokens * a.q_heads; ++i)
    a.lse[i] = a.sinks ? a.sinks[i % a.q_heads] : -std::numeric_limits<float>::infinity();
}

struct Plan {
  Schedule schedule;
  bool in_pieces;
  i64 status;
  i64 step = -1, threads, q_heads, kv_heads, dim;  // what it was made for: the layers of a step share it

  bool serves(const Attention& a, i64 count) const {
    return step == a.batch->step && threads == count && q_heads == a.q_heads && kv_heads == a.kv_heads && dim == a.dim;
  }
};

void make(const Attention& a, i64 threads, Plan& plan) {
  plan.status = list_tasks(a, threads, plan.schedule);
  plan.in_pieces = plan.status == kDone && (i64)plan.schedule.tasks.size() < 2 * threads && threads > 1;
  if (plan.in_pieces && !split(a, plan.schedule)) plan.status = kOutOfMemory;
  plan.step = plan.status == kDone ? a.batch->step : -1;
  plan.threads = threads;
  plan.q_heads = a.q_heads;
  plan.kv_heads = a.kv_heads;
  plan.dim = a.dim;
}

// The tasks that this worker can get of a list.
i64 run(const Attention& a, Worker& w, const Level& level, const std::vector<Task>& list, i64 phase) {
  char* const memory = w.scratch(scratch_bytes(max_task_rows(a) * group_heads(a), a.dim));
  i64 status = memory ? kDone : kOutOfMemory;
  const i64 grain = (i64)list.size() >= 2 * w.count * a.kv_heads ? a.kv_heads : 1;
  for (Worker::Range r; memory && w.next(r, list.size(), grain, phase);)
    for (i64 i = r.first; i < r.last; ++i)
      if (!level.attend(a, list[i], memory)) status = kOutOfRange;
  return status;
}

}  // namespace

// The prefixes, and when all of them are done, the tasks that go on from what they left.
i64 run_attention(const Attention& a, Worker& w, const Level& level) {
  static Plan plans[2];  // one pool, one kernel at a time; layers with and without a window may take turns
  if (a.batch->num_tokens == 0) return kDone;
  Plan& plan = plans[a.batch->window != 0];
  if (w.index == 0) {
    blank_padding(a);
    if (!plan.serves(a, w.count)) make(a, w.count, plan);
  }
  w.barrier();
  if (plan.status != kDone) return plan.status;
  const Schedule& todo = plan.schedule;
  level.enter(a);
  i64 status = kDone;
  if (!todo.prefixes.empty()) {
    status = run(a, w, level, todo.prefixes, 0);
    w.barrier();
  }
  if (status == kDone) status = run(a, w, level, plan.in_pieces ? todo.pieces : todo.tasks, 1);
  level.leave(a);
  if (!plan.in_pieces) return status;
  w.barrier();
  const auto pieces_of = [](const Task& t) { return std::max<i64>(1, t.num_segments); };
  i64 piece = 0, merged = 0;
  for (const Task& task : todo.tasks) {
    if (task.num_segments > 1 && merged++ % w.count == w.index) {
      Task whole = task;
      whole.partial = todo.pieces[piece].partial;
      level.merge(a, whole);
    }
    piece += pieces_of(task);
  }
  return status;
}

}  // namespace quire
