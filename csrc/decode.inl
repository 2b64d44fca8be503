// The decode kernel, compiled once per instruction set (see simd.inl).
//
// A page holds its heads side by side, so a chunk of heads is walked page by page: what is read is long
// runs in memory order, which the hardware's prefetcher follows; head by head it would be scattered pieces
// of a few KiB, at two thirds of the bandwidth. The price is a softmax that is taken a tile (a page, or
// part of a long one) at a time, with a running maximum, and K dots and V sums of one tile. Logits are
// kept, so that the final probabilities can be added to the scores.

// logits[g, s] = q[g] . k[s] for G queries and S slots.
template <class T, int G, int S>
KVC_INLINE void dots(const typename T::raw* k, int64_t stride, const float* q, int64_t q_stride, float* logits,
                     int64_t logit_stride, int32_t dim) {
  vf acc[G][S] = {};
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) {
    vf x[S];
    for (int s = 0; s < S; s++) x[s] = T::load(k + s * stride + d);
    for (int g = 0; g < G; g++) {
      const vf y = load_raw<vf>(q + g * q_stride + d);
      for (int s = 0; s < S; s++) acc[g][s] += x[s] * y;
    }
  }
  for (int g = 0; g < G; g++) {
    float* to = logits + g * logit_stride;
    if (S == 4)
      sum4(acc[g], to);
    else
      for (int s = 0; s < S; s++) to[s] = sum(acc[g][s]);
    for (int64_t e = d; e < dim; e++)
      for (int s = 0; s < S; s++) to[s] += load_one<T>(k + s * stride + e) * q[g * q_stride + e];
  }
}

template <class T, int G, int S>
KVC_APART void dots_of_run(const typename T::raw* k, int32_t count, int64_t stride, const float* q,
                           int64_t q_stride, float* logits, int64_t logit_stride, int32_t dim) {
  for (; count >= S; count -= S, k += S * stride, logits += S)
    dots<T, G, S>(k, stride, q, q_stride, logits, logit_stride, dim);
  for (; count > 0; count--, k += stride, logits++)
    dots<T, G, 1>(k, stride, q, q_stride, logits, logit_stride, dim);
}

// acc[g, 0:V vectors] += sum over the tile's slots of weight[g, s] * v[s].
template <class T, int G, int V>
KVC_INLINE void add_part(const typename T::raw* v, int32_t count, int64_t stride, const float* weight, float* acc,
                         int64_t acc_stride) {
  vf part[G][V];
  for (int g = 0; g < G; g++)
    for (int i = 0; i < V; i++) part[g][i] = load_raw<vf>(acc + g * acc_stride + i * kLanes);
  for (; count > 0; count--, v += stride, weight++)
    for (int i = 0; i < V; i++) {
      const vf x = T::load(v + i * kLanes);
      for (int g = 0; g < G; g++) part[g][i] += x * weight[g * kTile];
    }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < V; i++) store_raw(acc + g * acc_stride + i * kLanes, part[g][i]);
}

template <class T, int G>
KVC_APART void add_values(const typename T::raw* v, int32_t count, int64_t stride, const float* weight, float* acc,
                          int64_t acc_stride, int32_t dim) {
  constexpr int kWide = KVC_WIDE / G;
  int32_t d = 0;
  for (; d + kWide * kLanes <= dim; d += kWide * kLanes)
    add_part<T, G, kWide>(v + d, count, stride, weight, acc + d, acc_stride);
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes)
    add_part<T, G, 2>(v + d, count, stride, weight, acc + d, acc_stride);
  for (; d + kLanes <= dim; d += kLanes) add_part<T, G, 1>(v + d, count, stride, weight, acc + d, acc_stride);
  for (; d < dim; d++)
    for (int32_t s = 0; s < count; s++)
      for (int g = 0; g < G; g++)
        acc[g * acc_stride + d] += load_one<T>(v + s * stride + d) * weight[g * kTile + s];
}

// Turns a tile's logits into weights relative to the running maximum; rescales what came before.
KVC_APART void soften(float* logits, int32_t count, int32_t lanes, float* weight, float* acc, int32_t dim,
                      float& best, float& total) {
  // The row's logits are padded to whole tiles: the next tile overwrites what is written beyond `count`.
  for (int32_t s = count; s < lanes; s++) logits[s] = -__builtin_inff();
  vf most = load_raw<vf>(logits);
  for (int32_t s = kLanes; s < lanes; s += kLanes) most = maximum(most, load_raw<vf>(logits + s));
  const float now = top(most);
  if (now > best) {
    const float factor = exp_negative(splat(best - now))[0];
    for (int32_t d = 0; d < dim; d += kLanes) store_raw(acc + d, load_raw<vf>(acc + d) * factor);
    total *= factor;
    best = now;
  }
  vf part = {};
  for (int32_t s = 0; s < lanes; s += kLanes) {
    const vf w = exp_negative(load_raw<vf>(logits + s) - best);
    store_raw(weight + s, w);
    part += w;
  }
  total += sum(part);
}

// Heads [first, last) of one type in one row, with the memory they work in.
template <class T>
struct Chunk {
  using raw = typename T::raw;
  const Step& step;
  const HeadType& type;
  const int32_t row, first, last;
  const int32_t prefix = step.prefix[row], dim = step.dim, group = step.group, page = type.page;
  const int32_t* const blocks = type.block_table + row * type.table_row;
  const Phase phase = phase_of(type, prefix, step.length[row]);
  const bool scores = type.evicts && !type.ring && phase.token >= 0;
  const int64_t stride = 2 * dim, wide = padded(dim), logit_stride = logits_of(phase.resident);
  const int64_t queries = int64_t(last - first) * group;
  float *const logits, *const q = logits + queries * logit_stride, *const acc = q + queries * wide;
  float *const weight = acc + queries * wide, *const best = weight + group * kTile, *const total = best + queries;

  Chunk(const Step& step, const HeadType& type, int32_t row, int32_t first, int32_t last, float* scratch)
      : step(step), type(type), row(row), first(first), last(last), logits(scratch) {}

  KVC_INLINE raw* slot_at(int32_t slot, int32_t head) const {
    return reinterpret_cast<raw*>(type.kv) + blocks[slot / page] * type.kv_block + head * type.kv_head +
           slot % page * stride;
  }
  KVC_INLINE float* score_at(int32_t slot, int32_t head) const {
    return type.score + blocks[slot / page] * type.score_block + head * type.score_head + slot % page;
  }
  KVC_INLINE int32_t tile_end(int32_t slot) const {
    int32_t end = slot + page - slot % page;
    end = end < slot + kTile ? end : slot + kTile;
    return end < phase.resident ? end : phase.resident;
  }

  // This step's K and V into their slot, its query to float32.
  void begin(int32_t head) const {
    const int64_t source = type.head_index[head];
    int32_t slot = phase.slot;
    if (slot < 0) {
      slot = prefix + type.victim[blocks[phase.nth / page] * type.victim_block + head * type.victim_head +
                                  phase.nth % page];
    }
    raw* mine = slot_at(slot, head);
    __builtin_memcpy(mine, step.k + (row * step.k_row + source * step.k_head) * sizeof(raw), dim * sizeof(raw));
    __builtin_memcpy(mine + dim, step.v + (row * step.v_row + source * step.v_head) * sizeof(raw),
                     dim * sizeof(raw));
    type.token[blocks[slot / page] * type.token_block + head * type.token_head + slot % page] = phase.token;
    *score_at(slot, head) = 0;

    const int64_t at = int64_t(head - first) * group;
    for (int32_t g = 0; g < group; g++) {
      const raw* from = reinterpret_cast<const raw*>(step.q) + row * step.q_row + (source * group + g) * step.q_head;
      float* to = q + (at + g) * wide;
      int32_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store_raw(to + d, T::load(from + d) * step.scale);
      for (; d < dim; d++) to[d] = load_one<T>(from + d) * step.scale;
      for (d = 0; d < wide; d += kLanes) store_raw(acc + (at + g) * wide + d, vf{});
      best[at + g] = -__builtin_inff();
      total[at + g] = 0;
    }
  }

  // One head over the slots [slot, end) of one page.
  KVC_INLINE void tile(int32_t head, int32_t slot, int32_t end) const {
    const int32_t count = end - slot, lanes = (count + kLanes - 1) / kLanes * kLanes;
    const raw* k = slot_at(slot, head);
    const int64_t at = int64_t(head - first) * group;
    const float* mine = q + at * wide;
    float *sums = acc + at * wide, *to = logits + at * logit_stride + slot;
    int32_t g = 0;
    for (; g + 4 <= group; g += 4)
      dots_of_run<T, 4, 1>(k, count, stride, mine + g * wide, wide, to + g * logit_stride, logit_stride, dim);
    for (; g + 2 <= group; g += 2)
      dots_of_run<T, 2, 2>(k, count, stride, mine + g * wide, wide, to + g * logit_stride, logit_stride, dim);
    if (g < group)
      dots_of_run<T, 1, 4>(k, count, stride, mine + g * wide, wide, to + g * logit_stride, logit_stride, dim);
    for (g = 0; g < group; g++)
      soften(to + g * logit_stride, count, lanes, weight + g * kTile, sums + g * wide, dim, best[at + g],
             total[at + g]);
    for (g = 0; g + 2 <= group; g += 2)
      add_values<T, 2>(k + dim, count, stride, weight + g * kTile, sums + g * wide, wide, dim);
    if (g < group) add_values<T, 1>(k + dim, count, stride, weight + g * kTile, sums + g * wide, wide, dim);
  }

  void finish(int32_t head) const {
    const int64_t source = type.head_index[head], at = int64_t(head - first) * group;
    for (int32_t g = 0; g < group; g++) {
      raw* to = reinterpret_cast<raw*>(step.out) + row * step.out_row + (source * group + g) * step.out_head;
      const float* from = acc + (at + g) * wide;
      const float inverse = 1 / total[at + g];
      int32_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) T::store(to + d, load_raw<vf>(from + d) * inverse);
      for (; d < dim; d++) store_one<T>(to + d, from[d] * inverse);
    }
    if (!scores) return;
    float* mass = logits + at * logit_stride;
    for (int32_t s = 0; s < phase.resident; s += kLanes) {
      vf x = {};
      for (int32_t g = 0; g < group; g++)
        x += exp_negative(load_raw<vf>(mass + g * logit_stride + s) - best[at + g]) * (1 / total[at + g]);
      store_raw(mass + s, x);
    }
    for (int32_t s = prefix, end; s < phase.resident; s = end) {
      end = tile_end(s);
      float* to = score_at(s, head);
      for (int32_t i = 0; i < end - s; i++) to[i] += mass[s + i];
    }
  }

  // Touches the first lines of what comes `kAhead` bytes later, to start the hardware's prefetcher there:
  // it stops at every 4 KiB, and fetching all lines by instruction is slower than what it does.
  KVC_INLINE void kick(int32_t head, int32_t slot, int32_t end) const {
    const int64_t run = (end - slot) * stride * int64_t(sizeof(raw));
    int32_t to = head + int32_t(run < KVC_AHEAD ? KVC_AHEAD / run : 1);
    if (to >= last) {
      if (end >= phase.resident) return;
      to = to - last + first;
      if (to >= last) to = last - 1;
      slot = end;
    }
    const char* p = reinterpret_cast<const char*>(slot_at(slot, to));
    for (int64_t at = 0; at < run; at += 4096)
      for (int line = 0; line < KVC_KICK; line++) __builtin_prefetch(p + at + 64 * line, 0, 2);
    if (scores) __builtin_prefetch(score_at(slot, to), 1, 2);
  }

  void run() const {
    for (int32_t head = first; head < last; head++) begin(head);
    for (int32_t slot = 0, end; slot < phase.resident; slot = end) {
      end = tile_end(slot);
      for (int32_t head = first; head < last; head++) {
        kick(head, slot, end);
        tile(head, slot, end);
      }
    }
    for (int32_t head = first; head < last; head++) finish(head);
  }

  static void decode(const Step& step, const HeadType& type, int32_t row, int32_t first, int32_t last,
                     float* scratch) {
    if (step.length[row] > 0) {
      Chunk(step, type, row, first, last, scratch).run();
      return;
    }
    for (int32_t head = first; head < last; head++)
      for (int32_t g = 0; g < step.group; g++)
        __builtin_memset(reinterpret_cast<raw*>(step.out) + row * step.out_row +
                             (int64_t(type.head_index[head]) * step.group + g) * step.out_head,
                         0, step.dim * sizeof(raw));
  }
};

void decode_any(const Step& step, const HeadType& type, int32_t row, int32_t first, int32_t last, float* scratch) {
  switch (step.dtype) {
    case kBFloat16: return Chunk<BF16>::decode(step, type, row, first, last, scratch);
    case kFloat16: return Chunk<F16>::decode(step, type, row, first, last, scratch);
    default: return Chunk<F32>::decode(step, type, row, first, last, scratch);
  }
}
