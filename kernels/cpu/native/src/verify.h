// Which drafted tokens the target keeps, and the one behind them: the walk of kernels/reference/verify.py, each tree by
// one thread.

struct Verify {
  i64 rows;                     // trees
  const float *target, *draft;  // [rows, nodes, columns]
  i64 nodes, columns;
  const i64 *tokens, *parents;                  // [rows, nodes]
  const i64 *seeds, *sample_index, *positions;  // [rows]
  std::uint8_t* accepted;                       // [rows, nodes]
  i64* last;                                    // [rows]
};

// What p and q have become behind the children that were rejected, each up to its mass. A row's own distributions are
// read where they are; residuals lie in `room`, the next p beside the one that it is made of.
struct Residual {
  const float *p, *q;
  double p_mass, q_mass;
  float *room, *spare, *q_room;

  static i64 padded(i64 columns) { return (columns + kLanes - 1) / kLanes * kLanes; }
  static i64 bytes(i64 columns) { return 3 * padded(columns) * (i64)sizeof(float); }

  Residual(char* memory, i64 columns)
      : room((float*)memory), spare(room + padded(columns)), q_room(spare + padded(columns)) {}

  void enter(const float* target, const float* draft) {
    p = target;
    q = draft;
    p_mass = q_mass = 1;
  }

  // (p - q)_+, and q without x. Where rounding leaves nothing, p and q are equal up to rounding, and p is as good.
  void reject(i64 x, i64 columns) {
    constexpr i64 kPiece = 256;  // columns that are summed in fp32
    const float p_factor = (float)(1 / p_mass), q_factor = (float)(1 / q_mass);
    double left = 0;
    for (i64 c = 0; c < columns; c += kPiece) {
      f32x16 some{};
      for_lanes(columns - c < kPiece ? columns - c : kPiece, [&](auto at, auto put) {
        const f32x16 mine = at(q + c) * q_factor, rest = max(at(p + c) * p_factor - mine, f32x16{});
        put(q_room + c, mine);
        put(room + c, rest);
        some += rest;
      });
      left += sum_lanes(some);
    }
    q = q_room;
    q_room[x] = 0;
    q_mass = 0;  // summed when there is another child to judge
    if (!(left > 0)) return;
    p = room;
    p_mass = left;
    room = spare;
    spare = (float*)p;
  }

  void weigh_draft(i64 columns) {
    constexpr float kTiny = 1.17549435e-38f;
    double sum = 0;
    for (i64 c = 0; c < columns; c += kLanes) sum += sum_lanes(max(load_row(q, columns, c), f32x16{}));
    q_mass = sum > kTiny ? sum : kTiny;
  }
};

// At least log(x) of a number above 0, at most 0.06 more: the chords of log2, raised by the most that it leaves them.
INLINE f32x16 log_bound(f32x16 x) {
  const f32x16 bits = __builtin_convertvector((i32x16)x, f32x16);
  return fma(bits, splat(kLn2 / 8388608.0f), splat(-127 * kLn2 + 0.0598f));
}

// The column that wins log(p) + noise; 0 where nothing has a chance.
static i64 draw_from(const float* p, double mass, i64 columns, const Source& source) {
  const f32x16 factor = splat((float)(1 / mass)), least = splat(0x1p-149f);
  Draw best = {-kInfinity, kNoColumn};
  for (i64 group = 0; group < ceil_div(columns, kGroup); ++group) {
    f32x16 x[4], bound[4];
    std::uint32_t open[4], any = 0;
    for (i64 i = 0; i < 4; ++i) {
      x[i] = load_row(p, columns, group * kGroup + i * kLanes) * factor;
      bound[i] = log_bound(x[i]);
      open[i] = bits_from(x[i], least) & bits_from(bound[i], splat(best.value - kMostNoise));
      any |= open[i];
    }
    if (!any) continue;
    u32x16 words[4];
    words_of(source, group, words);
    for (i64 i = 0; i < 4; ++i) {
      const f32x16 u = uniform(words[i]);
      for_bits(open[i] & bits_from(bound[i] + noise_bound(u), splat(best.value)), [&](i64 j) {
        best.take({(float)__builtin_log((double)x[i][j]) + gumbel(u[j]), group * kGroup + i * kLanes + j});
      });
    }
  }
  return best.column == kNoColumn ? 0 : best.column;
}

// False: a child's token is outside of the vocabulary.
static bool verify_tree(const Verify& v, i64 tree, Residual rest) {
  constexpr std::uint32_t kAccept = 2, kBonus = 3;  // Purpose.ACCEPT and Purpose.BONUS
  const i64 first = tree * v.nodes;
  const auto noise = [&](i64 depth, std::uint32_t purpose) {
    return source_of(v.seeds[tree], v.sample_index[tree], v.positions[tree] + depth, purpose);
  };
  const auto enter = [&](i64 row) {
    rest.enter(v.target + (first + row) * v.columns, v.draft + (first + row) * v.columns);
  };
  i64 current = 0, depth = 0, tried = 0;
  enter(0);
  __builtin_memset(v.accepted + first, 0, v.nodes);
  for (i64 row = 1; row < v.nodes; ++row) {
    if (v.parents[first + row] != current) continue;
    const i64 x = v.tokens[first + row];
    if (x < 0 || x >= v.columns) return false;
    if (tried > 0) rest.weigh_draft(v.columns);
    u32x16 words[4];
    words_of(noise(depth, kAccept), tried / kGroup, words);
    const float u = uniform(words[tried % kGroup / kLanes])[tried % kLanes];
    if (u * (float)(rest.q[x] / rest.q_mass) < (float)(rest.p[x] / rest.p_mass)) {
      v.accepted[first + row] = 1;
      current = row;
      tried = 0;
      ++depth;
      enter(row);
    } else {
      ++tried;
      rest.reject(x, v.columns);
    }
  }
  v.last[tree] = draw_from(rest.p, rest.p_mass, v.columns, noise(depth, kBonus));
  return true;
}

static i64 verify(const Verify& v, Worker& w) {
  char* const memory = w.scratch(Residual::bytes(v.columns));
  if (!memory) return kOutOfMemory;
  for (Worker::Range tree; w.next(tree, v.rows, 1);)
    if (!verify_tree(v, tree.first, Residual(memory, v.columns))) return kOutOfRange;
  return kDone;
}
