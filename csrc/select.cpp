// Victims at a line's end, for all heads of one type in all layers.

#include <algorithm>
#include <cmath>
#include <vector>

#include "abi.h"

namespace {

float to_float(float x) { return x; }

float bfloat16_to_float(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

float float16_to_float(uint16_t x) {
  const uint32_t sign = uint32_t(x & 0x8000u) << 16, exponent = (x >> 10) & 31, mantissa = x & 1023;
  if (exponent == 0) return std::copysign(std::ldexp(float(mantissa), -24), sign ? -1.0f : 1.0f);
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

template <class Raw, float (*Load)(Raw)>
float norm_of(const Raw* v, int32_t dim) {
  float sum[8] = {};
  int32_t d = 0;
  for (; d + 8 <= dim; d += 8)
    for (int32_t i = 0; i < 8; i++) sum[i] += Load(v[d + i]) * Load(v[d + i]);
  for (; d < dim; d++) sum[d % 8] += Load(v[d]) * Load(v[d]);
  return std::sqrt(((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7])));
}

// L2 norm of the value vector at slot `off` of a page.
float value_norm(const HeadType& type, int64_t block, int32_t head, int32_t off) {
  const int64_t at = block * type.kv_block + head * type.kv_head + off * int64_t(2 * type.dim) + type.dim;
  if (type.dtype == kFloat32) return norm_of<float, to_float>((const float*)type.kv + at, type.dim);
  const uint16_t* half = (const uint16_t*)type.kv + at;
  return type.dtype == kBFloat16 ? norm_of<uint16_t, bfloat16_to_float>(half, type.dim)
                                 : norm_of<uint16_t, float16_to_float>(half, type.dim);
}

// The victims of one cache head, lowest (score, token) first.
struct Chooser {
  struct Slot {
    uint64_t key;
    int32_t slot;
    bool operator<(const Slot& other) const { return key < other.key; }
  };
  std::vector<Slot> slots;
  // What a refined choice looks at: of every resident slot its token and score, and the scores over the raster
  // with an empty column on either side (`there` says where a slot holds the token).
  struct Held {
    int32_t token;
    float score;
  };
  std::vector<Held> held;
  std::vector<float> raster;
  std::vector<char> there;

  static uint64_t key(float score, int16_t token) {
    uint32_t bits;
    score += 0.0f;  // -0 and 0 tie
    __builtin_memcpy(&bits, &score, 4);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return uint64_t(bits) << 16 | uint16_t(token);
  }

  int32_t cell(const HeadType& type, int32_t token) const {
    return token / type.line * (type.line + 2) + token % type.line + 1;
  }

  // The arithmetic, and its order, are the rule's: attention/select.py.
  void refine(const HeadType& type, const int32_t* blocks, int32_t head, int32_t prefix, int32_t resident) {
    const int32_t page = type.page;
    held.resize(resident);
    for (int32_t i = 0; i < resident; i++) {
      const int32_t s = prefix + i, off = s % page;
      const int64_t block = blocks[s / page];
      float score = type.score[block * type.score_block + head * type.score_head + off];
      if (type.value_norm) score *= value_norm(type, block, head, off);
      held[i] = {type.token[block * type.token_block + head * type.token_head + off], score};
    }
    if (!type.smooth_row) return;
    const size_t cells = size_t(type.image / type.line) * (type.line + 2);
    raster.assign(cells, 0.0f);
    there.assign(cells, 0);
    for (const Held& one : held) {
      raster[cell(type, one.token)] = one.score;
      there[cell(type, one.token)] = 1;
    }
    for (Held& one : held) {
      const int32_t at = cell(type, one.token);
      const float total = (one.score + raster[at - 1]) + raster[at + 1];
      one.score = total / float(1 + there[at - 1] + there[at + 1]);
    }
  }

  void run(const HeadType& type, const int32_t* blocks, int32_t head, int32_t prefix, int32_t drawn,
           int32_t due) {
    slots.clear();
    const int32_t resident = std::min(drawn, type.capacity), page = type.page, newest = drawn - type.recent;
    const bool refined = due > 0 && (type.value_norm || type.smooth_row);
    if (refined) refine(type, blocks, head, prefix, resident);
    for (int32_t s = prefix; s < prefix + resident;) {
      const int32_t off = s % page, here = std::min(page - off, prefix + resident - s);
      const int64_t block = blocks[s / page];
      float* score = type.score + block * type.score_block + head * type.score_head + off;
      const int16_t* token = type.token + block * type.token_block + head * type.token_head + off;
      if (due > 0)
        for (int32_t i = 0; i < here; i++)
          if (token[i] >= type.anchors && token[i] < newest)
            slots.push_back({key(refined ? held[s + i - prefix].score : score[i], token[i]), s + i - prefix});
      if (type.decay == 0) {
        std::fill(score, score + here, 0.0f);  // also what is not finite
      } else if (type.decay != 1) {
        for (int32_t i = 0; i < here; i++) score[i] *= type.decay;
      }
      s += here;
    }
    due = std::min<int32_t>(due, slots.size());
    if (due <= 0) return;
    std::nth_element(slots.begin(), slots.begin() + (due - 1), slots.end());
    std::sort(slots.begin(), slots.begin() + due);
    for (int32_t j = 0; j < due; j++)
      type.victim[blocks[j / page] * type.victim_block + head * type.victim_head + j % page] = slots[j].slot;
  }
};

}  // namespace

int32_t kvc_select(const HeadType* type, const int32_t* prefix, const int32_t* length, const int32_t* size,
                   int32_t rows, int32_t threads) {
  constexpr int32_t kChunk = 16;
  if (type->ring || !type->evicts) return 0;
  std::vector<int32_t> due;
  HeadType sized;
  for (int32_t row = 0; row < rows; row++) {
    const int32_t drawn = length[row] - prefix[row];
    const HeadType& mine = of_row(*type, size, row, sized);
    if (length[row] > 0 && drawn > 0 && drawn % mine.line == 0 && mine.evicts) due.push_back(row);
  }
  const int64_t per_row = (type->heads + kChunk - 1) / kChunk, n = per_row * due.size();
#pragma omp parallel num_threads( \
        std::clamp<int64_t>(threads, 1, std::max<int64_t>(n, 1))) if (n > 1 && threads > 1)
  {
    Chooser chooser;
    chooser.slots.reserve(type->widest);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < n; i++) {
      const int32_t row = due[i / per_row], first = i % per_row * kChunk;
      const int32_t drawn = length[row] - prefix[row];
      HeadType own;
      const HeadType& mine = of_row(*type, size, row, own);
      const int32_t victims = std::min(mine.line, mine.image - drawn) - std::max(0, mine.capacity - drawn);
      for (int32_t head = first; head < std::min(first + kChunk, mine.heads); head++)
        chooser.run(mine, mine.block_table + row * mine.table_row, head, prefix[row], drawn, victims);
    }
  }
  return due.size();
}
