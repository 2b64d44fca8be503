// The decode kernel, compiled once per instruction set (see simd.inl).
//
// A page holds its heads side by side, so a chunk of heads is walked tile by tile (a few pages), all heads of
// a tile in turn: what is read is long runs in memory order. Each head's arithmetic also touches the same
// bytes of the next head, spread evenly, because memory is what this waits for. The price is a softmax taken
// a tile at a time with a running maximum. Logits are kept, so that the final probabilities can be added to
// the scores.

#include "simd.inl"

// logits[g, s] = q[g] . k[s] for G queries and S slots.
template <class T, int G, int S>
KVC_INLINE void dots(const typename T::raw* k, int64_t stride, const float* q, int64_t q_stride,
                     float* logits, int64_t logit_stride, int32_t dim) {
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
  float apart[G * S];
  float* dot = G == 1 ? logits : apart;
  if (G * S == 4)
    sum4(&acc[0][0], dot);
  else
    for (int i = 0; i < G * S; i++) dot[i] = sum(acc[i / S][i % S]);
  for (int64_t e = d; e < dim; e++)
    for (int i = 0; i < G * S; i++) dot[i] += load_one<T>(k + i % S * stride + e) * q[i / S * q_stride + e];
  if (G > 1)
    for (int i = 0; i < G * S; i++) logits[i / S * logit_stride + i % S] = dot[i];
}

KVC_INLINE void touch(const char*& ahead, int64_t bytes) {
  if (!ahead) return;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(ahead + at, 0, 2);
  ahead += bytes;
}

template <class T, int G, int S>
KVC_APART void dots_of_run(const typename T::raw* k, int32_t count, int64_t stride, const float* q,
                           int64_t q_stride, float* logits, int64_t logit_stride, int32_t dim,
                           const char* ahead) {
  for (; count >= S; count -= S, k += S * stride, logits += S) {
    touch(ahead, S * dim * sizeof(*k));
    dots<T, G, S>(k, stride, q, q_stride, logits, logit_stride, dim);
  }
  for (; count > 0; count--, k += stride, logits++) {
    touch(ahead, dim * sizeof(*k));
    dots<T, G, 1>(k, stride, q, q_stride, logits, logit_stride, dim);
  }
}

// acc[g, 0:V vectors] += sum over the tile's slots of weight[g, s] * v[s].
template <class T, int G, int V>
KVC_INLINE void add_part(const typename T::raw* v, int32_t count, int64_t stride, const float* weight,
                         float* acc, int64_t acc_stride, const char* ahead, int64_t bytes) {
  vf part[G][V];
  for (int g = 0; g < G; g++)
    for (int i = 0; i < V; i++) part[g][i] = load_raw<vf>(acc + g * acc_stride + i * kLanes);
  for (; count > 0; count--, v += stride, weight++) {
    touch(ahead, bytes);
    for (int i = 0; i < V; i++) {
      const vf x = T::load(v + i * kLanes);
      for (int g = 0; g < G; g++) part[g][i] += x * weight[g * kTile];
    }
  }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < V; i++) store_raw(acc + g * acc_stride + i * kLanes, part[g][i]);
}

template <class T, int G>
KVC_APART void add_values(const typename T::raw* v, int32_t count, int64_t stride, const float* weight,
                          float* acc, int64_t acc_stride, int32_t dim, const char* ahead) {
  constexpr int kWide = KVC_WIDE / G < 8 ? KVC_WIDE / G : 8;  // accumulators that fit the registers
  int32_t d = 0;
  for (; d + kWide * kLanes <= dim; d += kWide * kLanes)
    add_part<T, G, kWide>(v + d, count, stride, weight, acc + d, acc_stride, ahead, d ? 0 : dim * sizeof(*v));
  for (; d + 2 * kLanes <= dim; d += 2 * kLanes)
    add_part<T, G, 2>(v + d, count, stride, weight, acc + d, acc_stride, ahead, d ? 0 : dim * sizeof(*v));
  for (; d + kLanes <= dim; d += kLanes)
    add_part<T, G, 1>(v + d, count, stride, weight, acc + d, acc_stride, ahead, d ? 0 : dim * sizeof(*v));
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
  float *const weight = acc + queries * wide, *const best = weight + group * kTile,
               *const total = best + queries;

  Chunk(const Step& step, const HeadType& type, int32_t row, int32_t first, int32_t last, float* scratch)
      : step(step), type(type), row(row), first(first), last(last), logits(scratch) {}

  KVC_INLINE raw* slot_at(int32_t slot, int32_t head) const {
    return reinterpret_cast<raw*>(type.kv) + blocks[slot / page] * type.kv_block + head * type.kv_head +
           slot % page * stride;
  }
  KVC_INLINE float* score_at(int32_t slot, int32_t head) const {
    return type.score + blocks[slot / page] * type.score_block + head * type.score_head + slot % page;
  }
  KVC_INLINE int32_t least(int32_t a, int32_t b) const { return a < b ? a : b; }
  KVC_INLINE int32_t run_end(int32_t slot, int32_t end) const {
    return least(slot + page - slot % page, end);
  }
  KVC_INLINE int32_t tile_end(int32_t slot) const {
    const int32_t end =
        page < kTile ? slot + kTile / page * page : least(slot + kTile, slot + page - slot % page);
    return least(end, phase.resident);
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
    __builtin_memcpy(mine, step.k + (row * step.k_row + source * step.k_head) * sizeof(raw),
                     dim * sizeof(raw));
    __builtin_memcpy(mine + dim, step.v + (row * step.v_row + source * step.v_head) * sizeof(raw),
                     dim * sizeof(raw));
    if (type.evicts && !type.ring) {  // others have no such arrays
      type.token[blocks[slot / page] * type.token_block + head * type.token_head + slot % page] = phase.token;
      *score_at(slot, head) = 0;
    }

    const int64_t at = int64_t(head - first) * group;
    for (int32_t g = 0; g < group; g++) {
      const raw* from =
          reinterpret_cast<const raw*>(step.q) + row * step.q_row + (source * group + g) * step.q_head;
      float* to = q + (at + g) * wide;
      int32_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store_raw(to + d, T::load(from + d) * step.scale);
      for (; d < dim; d++) to[d] = load_one<T>(from + d) * step.scale;
      for (d = 0; d < wide; d += kLanes) store_raw(acc + (at + g) * wide + d, vf{});
      best[at + g] = -__builtin_inff();
      total[at + g] = 0;
    }
  }

  // One head over the slots [first_slot, end), touching those of head `next` from slot `next_slot` on.
  KVC_INLINE void tile(int32_t head, int32_t first_slot, int32_t end, int32_t next, int32_t next_slot) const {
    const int32_t count = end - first_slot, lanes = (count + kLanes - 1) / kLanes * kLanes;
    const int32_t skip = next_slot - first_slot, limit = phase.resident - 1;
    const int64_t at = int64_t(head - first) * group, half = dim * int64_t(sizeof(raw));
    const float* mine = q + at * wide;
    float *sums = acc + at * wide, *tile_logits = logits + at * logit_stride + first_slot;
    int32_t g = 0;
    for (int32_t slot = first_slot, to; slot < end; slot = to) {
      to = run_end(slot, end);
      const raw* k = slot_at(slot, head);
      const char* ahead = reinterpret_cast<const char*>(slot_at(least(slot + skip, limit), next));
      float* here = tile_logits + (slot - first_slot);
      for (g = 0; g + 4 <= group; g += 4)
        dots_of_run<T, 4, 1>(k, to - slot, stride, mine + g * wide, wide, here + g * logit_stride,
                             logit_stride, dim, g ? nullptr : ahead);
      for (; g + 2 <= group; g += 2)
        dots_of_run<T, 2, 2>(k, to - slot, stride, mine + g * wide, wide, here + g * logit_stride,
                             logit_stride, dim, g ? nullptr : ahead);
      if (g < group)
        dots_of_run<T, 1, 4>(k, to - slot, stride, mine + g * wide, wide, here + g * logit_stride,
                             logit_stride, dim, g ? nullptr : ahead);
      if (scores) __builtin_prefetch(score_at(slot, head), 1, 2);
    }
    for (g = 0; g < group; g++)
      soften(tile_logits + g * logit_stride, count, lanes, weight + g * kTile, sums + g * wide, dim,
             best[at + g], total[at + g]);
    for (int32_t slot = first_slot, to; slot < end; slot = to) {
      to = run_end(slot, end);
      const raw* v = slot_at(slot, head) + dim;
      const char* ahead = reinterpret_cast<const char*>(slot_at(least(slot + skip, limit), next));
      ahead += (to - slot) * half;
      const float* by = weight + (slot - first_slot);
      for (g = 0; g + 4 <= group; g += 4)
        add_values<T, 4>(v, to - slot, stride, by + g * kTile, sums + g * wide, wide, dim,
                         g ? nullptr : ahead);
      for (; g + 2 <= group; g += 2)
        add_values<T, 2>(v, to - slot, stride, by + g * kTile, sums + g * wide, wide, dim,
                         g ? nullptr : ahead);
      if (g < group)
        add_values<T, 1>(v, to - slot, stride, by + g * kTile, sums + g * wide, wide, dim,
                         g ? nullptr : ahead);
    }
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
  }

  // Adds what `finish` left in place of the logits. Page by page: a page's scores are neighbours in memory.
  void add_scores() const {
    for (int32_t slot = prefix, end; slot < phase.resident; slot = end) {
      end = run_end(slot, phase.resident);
      for (int32_t head = first; head < last; head++) {
        const float* mass = logits + int64_t(head - first) * group * logit_stride;
        float* to = score_at(slot, head);
        for (int32_t s = slot; s < end; s++) to[s - slot] += mass[s];
      }
    }
  }

  void run() const {
    for (int32_t head = first; head < last; head++) begin(head);
    for (int32_t slot = 0, end; slot < phase.resident; slot = end) {
      end = tile_end(slot);
      for (int32_t head = first; head < last - 1; head++) tile(head, slot, end, head + 1, slot);
      tile(last - 1, slot, end, first, end);
    }
    for (int32_t head = first; head < last; head++) finish(head);
    if (scores) add_scores();
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

void decode_any(const Step& step, const HeadType& type, int32_t row, int32_t first, int32_t last,
                float* scratch) {
  switch (step.dtype) {
    case kBFloat16:
      return Chunk<BF16>::decode(step, type, row, first, last, scratch);
    case kFloat16:
      return Chunk<F16>::decode(step, type, row, first, last, scratch);
    default:
      return Chunk<F32>::decode(step, type, row, first, last, scratch);
  }
}
