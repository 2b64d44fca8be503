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

// Heads [first, last) of one type in one row, with the memory they work in: `lanes` queries a head (the query
// heads of its group; in a window those of every place) over the `slots` first logical slots.
template <class T>
struct Chunk {
  using raw = typename T::raw;
  const Step& step;
  const HeadType& type;
  const int32_t row, first, last, lanes, slots;
  const int32_t prefix = step.prefix[row], dim = step.dim, group = step.group, page = type.page;
  const int32_t* const blocks = type.block_table + row * type.table_row;
  const bool scores = type.evicts && !type.ring && step.length[row] > prefix;
  const int64_t stride = 2 * dim, wide = padded(dim), logit_stride;
  const int64_t queries = int64_t(last - first) * lanes;
  float *const logits, *const q = logits + queries * logit_stride, *const acc = q + queries * wide;
  float *const weight = acc + queries * wide, *const best = weight + lanes * kTile,
               *const total = best + queries;

  // `beyond`: tokens that are attended to after the slots.
  Chunk(const Step& step, const HeadType& type, int32_t row, int32_t first, int32_t last, int32_t lanes,
        int32_t slots, int32_t beyond, float* scratch)
      : step(step), type(type), row(row), first(first), last(last), lanes(lanes), slots(slots),
        logit_stride(logits_of(slots + beyond)), logits(scratch) {}

  KVC_INLINE raw* slot_at(int32_t slot, int32_t head) const {
    return reinterpret_cast<raw*>(type.kv) + blocks[slot / page] * type.kv_block + head * type.kv_head +
           slot % page * stride;
  }
  KVC_INLINE float* score_at(int32_t slot, int32_t head) const {
    return type.score + blocks[slot / page] * type.score_block + head * type.score_head + slot % page;
  }
  KVC_INLINE int16_t* token_at(int32_t slot, int32_t head) const {
    return type.token + blocks[slot / page] * type.token_block + head * type.token_head + slot % page;
  }
  KVC_INLINE int32_t least(int32_t a, int32_t b) const { return a < b ? a : b; }
  // The first slot that a head sees; a token before it sees itself alone.
  KVC_INLINE int32_t begin_of(int32_t head) const {
    if (!step.begins) return 0;
    return least(step.begins[2 * row + (type.head_index[head] >= step.kv_heads)], step.length[row] - 1);
  }
  KVC_INLINE int32_t run_end(int32_t slot, int32_t end) const {
    return least(slot + page - slot % page, end);
  }
  KVC_INLINE int32_t tile_end(int32_t slot) const {
    const int32_t end =
        page < kTile ? slot + kTile / page * page : least(slot + kTile, slot + page - slot % page);
    return least(end, slots);
  }
  // Where a token of this phase goes.
  KVC_INLINE int32_t target(const Phase& phase, int32_t head) const {
    if (phase.slot >= 0) return phase.slot;
    return prefix + type.victim[blocks[phase.nth / page] * type.victim_block + head * type.victim_head +
                                phase.nth % page];
  }

  // K and V of the step's row or token `from` into a slot.
  KVC_INLINE void write(int32_t slot, int32_t head, int64_t from, int32_t token) const {
    const int64_t source = type.head_index[head];
    raw* mine = slot_at(slot, head);
    __builtin_memcpy(mine, step.k + (from * step.k_row + source * step.k_head) * sizeof(raw),
                     dim * sizeof(raw));
    __builtin_memcpy(mine + dim, step.v + (from * step.v_row + source * step.v_head) * sizeof(raw),
                     dim * sizeof(raw));
    if (type.evicts && !type.ring) *token_at(slot, head) = token;  // others have no such arrays
  }

  // Queries of the step's row or token `from` to float32, into a head's lanes from `lane` on.
  KVC_INLINE void load(int32_t head, int64_t from, int32_t lane) const {
    const int64_t source = type.head_index[head], at = int64_t(head - first) * lanes + lane;
    for (int32_t g = 0; g < group; g++) {
      const raw* x =
          reinterpret_cast<const raw*>(step.q) + from * step.q_row + (source * group + g) * step.q_head;
      float* to = q + (at + g) * wide;
      int32_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) store_raw(to + d, T::load(x + d) * step.scale);
      for (; d < dim; d++) to[d] = load_one<T>(x + d) * step.scale;
      for (d = 0; d < wide; d += kLanes) store_raw(acc + (at + g) * wide + d, vf{});
      best[at + g] = -__builtin_inff();
      total[at + g] = 0;
    }
  }

  // Logits of a head's lanes against `count` keys.
  KVC_INLINE void multiply(int32_t head, const raw* k, int64_t k_stride, int32_t count, float* to,
                           const char* ahead) const {
    const float* mine = q + int64_t(head - first) * lanes * wide;
    int32_t g = 0;
    for (; g + 4 <= lanes; g += 4)
      dots_of_run<T, 4, 1>(k, count, k_stride, mine + g * wide, wide, to + g * logit_stride, logit_stride,
                           dim, g ? nullptr : ahead);
    for (; g + 2 <= lanes; g += 2)
      dots_of_run<T, 2, 2>(k, count, k_stride, mine + g * wide, wide, to + g * logit_stride, logit_stride,
                           dim, g ? nullptr : ahead);
    if (g < lanes)
      dots_of_run<T, 1, 4>(k, count, k_stride, mine + g * wide, wide, to + g * logit_stride, logit_stride,
                           dim, g ? nullptr : ahead);
  }

  // A tile's logits to weights, for all lanes of a head.
  KVC_INLINE void weigh(int32_t head, float* tile_logits, int32_t count) const {
    const int64_t at = int64_t(head - first) * lanes;
    const int32_t whole = (count + kLanes - 1) / kLanes * kLanes;
    for (int32_t g = 0; g < lanes; g++)
      soften(tile_logits + g * logit_stride, count, whole, weight + g * kTile, acc + (at + g) * wide, dim,
             best[at + g], total[at + g]);
  }

  // acc += weights times `count` values.
  KVC_INLINE void accumulate(int32_t head, const raw* v, int64_t v_stride, int32_t count, const float* by,
                             const char* ahead) const {
    float* sums = acc + int64_t(head - first) * lanes * wide;
    int32_t g = 0;
    for (; g + 4 <= lanes; g += 4)
      add_values<T, 4>(v, count, v_stride, by + g * kTile, sums + g * wide, wide, dim, g ? nullptr : ahead);
    for (; g + 2 <= lanes; g += 2)
      add_values<T, 2>(v, count, v_stride, by + g * kTile, sums + g * wide, wide, dim, g ? nullptr : ahead);
    if (g < lanes)
      add_values<T, 1>(v, count, v_stride, by + g * kTile, sums + g * wide, wide, dim, g ? nullptr : ahead);
  }

  // One head over the slots [first_slot, end), touching those of head `next` from slot `next_slot` on. `mask`
  // takes (head, first_slot, end, logits) between the products and the softmax.
  template <class Mask>
  KVC_INLINE void tile(int32_t head, int32_t first_slot, int32_t end, int32_t next, int32_t next_slot,
                       const Mask& mask) const {
    const int32_t skip = next_slot - first_slot, limit = slots - 1;
    const int64_t half = dim * int64_t(sizeof(raw));
    float* tile_logits = logits + int64_t(head - first) * lanes * logit_stride + first_slot;
    for (int32_t slot = first_slot, to; slot < end; slot = to) {
      to = run_end(slot, end);
      const char* ahead = reinterpret_cast<const char*>(slot_at(least(slot + skip, limit), next));
      multiply(head, slot_at(slot, head), stride, to - slot, tile_logits + (slot - first_slot), ahead);
      if (scores) __builtin_prefetch(score_at(slot, head), 1, 2);
    }
    mask(head, first_slot, end, tile_logits);
    weigh(head, tile_logits, end - first_slot);
    for (int32_t slot = first_slot, to; slot < end; slot = to) {
      to = run_end(slot, end);
      const char* ahead = reinterpret_cast<const char*>(slot_at(least(slot + skip, limit), next));
      ahead += (to - slot) * half;
      accumulate(head, slot_at(slot, head) + dim, stride, to - slot, weight + (slot - first_slot), ahead);
    }
  }

  template <class Mask>
  KVC_INLINE void tiles(const Mask& mask) const {
    for (int32_t slot = 0, end; slot < slots; slot = end) {
      end = tile_end(slot);
      for (int32_t head = first; head < last; head++) {
        // Tiles lie the same for all heads, wherever they begin: a head's sums depend on itself alone.
        const int32_t begin = begin_of(head), from = begin > slot ? begin : slot;
        if (from >= end) continue;
        const bool more = head < last - 1;
        tile(head, from, end, more ? head + 1 : first, more ? slot : end, mask);
      }
    }
  }

  // Outputs of the lanes from `lane` on, to the step's row or token `to`.
  KVC_INLINE void put(int32_t head, int32_t lane, int64_t to) const {
    const int64_t source = type.head_index[head], at = int64_t(head - first) * lanes + lane;
    for (int32_t g = 0; g < group; g++) {
      raw* x = reinterpret_cast<raw*>(step.out) + to * step.out_row + (source * group + g) * step.out_head;
      const float* from = acc + (at + g) * wide;
      const float inverse = 1 / total[at + g];
      int32_t d = 0;
      for (; d + kLanes <= dim; d += kLanes) T::store(x + d, load_raw<vf>(from + d) * inverse);
      for (; d < dim; d++) store_one<T>(x + d, from[d] * inverse);
    }
  }

  // Attention that the lanes of one token gave to `count` slots, in place of the first lane's logits.
  KVC_INLINE float* mass(int32_t head, int32_t lane, int32_t count) const {
    const int64_t at = int64_t(head - first) * lanes + lane;
    float* mine = logits + at * logit_stride;
    for (int32_t s = 0; s < count; s += kLanes) {
      vf x = {};
      for (int32_t g = 0; g < group; g++)
        x += exp_negative(load_raw<vf>(mine + g * logit_stride + s) - best[at + g]) * (1 / total[at + g]);
      store_raw(mine + s, x);
    }
    return mine;
  }
};

// One token a row: it is written, then its queries attend to all that is resident.
template <class T>
struct Decode : Chunk<T> {
  using Base = Chunk<T>;
  using Base::first, Base::last, Base::scores, Base::slots, Base::logits, Base::logit_stride, Base::lanes;
  const Phase phase;

  Decode(const Step& step, const HeadType& type, int32_t row, int32_t first, int32_t last, Phase phase,
         float* scratch)
      : Base(step, type, row, first, last, step.group, phase.resident, 0, scratch), phase(phase) {}

  // Page by page: a page's scores are neighbours in memory.
  void add_scores() const {
    for (int32_t slot = this->prefix, end; slot < slots; slot = end) {
      end = this->run_end(slot, slots);
      for (int32_t head = first; head < last; head++) {
        const float* mass = logits + int64_t(head - first) * lanes * logit_stride;
        float* to = this->score_at(slot, head);
        for (int32_t s = slot; s < end; s++) to[s - slot] += mass[s];
      }
    }
  }

  void run() const {
    for (int32_t head = first; head < last; head++) {
      const int32_t slot = this->target(phase, head);
      this->write(slot, head, this->row, phase.token);
      if (this->type.evicts && !this->type.ring) *this->score_at(slot, head) = 0;
      this->load(head, this->row, 0);
    }
    this->tiles([](int32_t, int32_t, int32_t, float*) {});
    for (int32_t head = first; head < last; head++) {
      this->put(head, 0, this->row);
      if (scores) this->mass(head, 0, slots);
    }
    if (scores) add_scores();
  }
};

// Several places a row; nothing is written into pages. Tokens past the line's end have no slots yet.
template <class T>
struct Verify : Chunk<T> {
  using Base = Chunk<T>;
  using Base::first, Base::last, Base::slots, Base::lanes, Base::group, Base::logit_stride, Base::step;
  using Base::type, Base::prefix, Base::row;
  const Window& window;
  const int32_t kind, count, start;
  const int32_t own = slots + kLanes;  // where their logits begin: the last tile's padding must not reach them
  int32_t* const taken;  // [heads, count]: the slots that the places' tokens will take

  Verify(const Step& step, const HeadType& type, const Window& window, int32_t kind, int32_t row,
         int32_t first, int32_t last, float* scratch)
      : Base(step, type, row, first, last, step.group * window.count[row],
             held_slots(type, step.prefix[row], step.length[row]), window.count[row], scratch),
        window(window), kind(kind), count(window.count[row]), start(window.start[row]),
        taken(reinterpret_cast<int32_t*>(this->total + this->queries)) {}

  void run() const {
    const float never = -__builtin_inff();
    const int32_t inside = type.line - (step.length[row] - 1 - prefix) % type.line;  // places of this line
    for (int32_t head = first; head < last; head++) {
      for (int32_t i = 0; i < count; i++) {
        this->load(head, start + i, i * group);
        const Phase phase = phase_of(type, prefix, step.length[row] + i);
        taken[(head - first) * count + i] = i < inside ? this->target(phase, head) : -1;
      }
      // The window's own keys and values first: every query sees at least itself, so none starts at -inf.
      const int64_t source = type.head_index[head];
      const auto* k = reinterpret_cast<const typename T::raw*>(step.k) + start * step.k_row;
      const auto* v = reinterpret_cast<const typename T::raw*>(step.v) + start * step.v_row;
      float* mine = this->logits + int64_t(head - first) * lanes * logit_stride + own;
      this->multiply(head, k + source * step.k_head, step.k_row, count, mine, nullptr);
      for (int32_t j = 0; j < count; j++)
        for (int32_t g = 0; g < group; g++)
          for (int32_t i = j + 1; i < count; i++) mine[(j * group + g) * logit_stride + i] = never;
      this->weigh(head, mine, count);
      this->accumulate(head, v + source * step.v_head, step.v_row, count, this->weight, nullptr);
    }
    // An old slot is seen until a token of the window lands in it.
    this->tiles([&](int32_t head, int32_t from, int32_t end, float* tile_logits) {
      for (int32_t i = 0; i < count; i++) {
        const int32_t slot = taken[(head - first) * count + i];
        if (slot < from || slot >= end) continue;
        for (int32_t lane = i * group; lane < lanes; lane++)
          tile_logits[lane * logit_stride + slot - from] = never;
      }
    });
    for (int32_t head = first; head < last; head++)
      for (int32_t j = 0; j < count; j++) {
        this->put(head, j * group, start + j);
        if (!this->scores) continue;
        const float* mine = this->mass(head, j * group, own + count);
        float* to = mass_at(window, type, kind, row, head, j);
        __builtin_memcpy(to, mine + prefix, (slots - prefix) * sizeof(float));
        __builtin_memcpy(to + type.capacity, mine + own, count * sizeof(float));
      }
  }
};

// The first `standing` places of a row's window, as drawing one by one would have left them.
template <class T>
void keep(const Step& step, const HeadType& type, const Window& window, int32_t kind, int32_t row,
          int32_t first, int32_t last, float* scratch) {
  const int32_t stands = window.standing[row], prefix = step.prefix[row], length = step.length[row];
  const int32_t held = held_slots(type, prefix, length);
  const Chunk<T> chunk(step, type, row, first, last, step.group, held, 0, scratch);
  const bool scores = type.evicts && !type.ring;
  for (int32_t head = first; head < last; head++) {
    // A slot's attention is added query by query, as it would have come.
    if (scores)
      for (int32_t slot = prefix, end; slot < held; slot = end) {
        end = chunk.run_end(slot, held);
        float* to = chunk.score_at(slot, head);
        for (int32_t j = 0; j < stands; j++) {
          const float* mass = mass_at(window, type, kind, row, head, j) - prefix;
          for (int32_t s = slot; s < end; s++) to[s - slot] += mass[s];
        }
      }
    for (int32_t i = 0; i < stands; i++) {
      const int32_t slot = chunk.target(phase_of(type, prefix, length + i), head);
      chunk.write(slot, head, window.start[row] + i, length - 1 - prefix + i);
      if (!scores) continue;
      float mass = 0;
      for (int32_t j = i; j < stands; j++)
        mass += mass_at(window, type, kind, row, head, j)[type.capacity + i];
      *chunk.score_at(slot, head) = mass;
    }
  }
}

template <class T>
void decode(const Step& step, const HeadType& type, int32_t row, int32_t first, int32_t last,
            float* scratch) {
  using raw = typename T::raw;
  if (step.length[row] > 0) {
    const Phase phase = phase_of(type, step.prefix[row], step.length[row]);
    Decode<T>(step, type, row, first, last, phase, scratch).run();
    return;
  }
  for (int32_t head = first; head < last; head++)
    for (int32_t g = 0; g < step.group; g++)
      __builtin_memset(reinterpret_cast<raw*>(step.out) + row * step.out_row +
                           (int64_t(type.head_index[head]) * step.group + g) * step.out_head,
                       0, step.dim * sizeof(raw));
}

template <class T>
void any(const Step& step, const HeadType& type, const Window* window, int32_t kind, int32_t row,
         int32_t first, int32_t last, float* scratch) {
  if (!window)
    decode<T>(step, type, row, first, last, scratch);
  else if (window->standing)
    keep<T>(step, type, *window, kind, row, first, last, scratch);
  else
    Verify<T>(step, type, *window, kind, row, first, last, scratch).run();
}

void run_any(const Step& step, const HeadType& type, const Window* window, int32_t kind, int32_t row,
             int32_t first, int32_t last, float* scratch) {
  switch (step.dtype) {
    case kBFloat16:
      return any<BF16>(step, type, window, kind, row, first, last, scratch);
    case kFloat16:
      return any<F16>(step, type, window, kind, row, first, last, scratch);
    default:
      return any<F32>(step, type, window, kind, row, first, last, scratch);
  }
}
