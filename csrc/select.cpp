// Victims at a line's end, for all heads of one type in all layers.

#include <algorithm>
#include <vector>

#include "abi.h"

namespace {

// The victims of one cache head, lowest (score, token) first.
struct Chooser {
  struct Slot {
    uint64_t key;
    int32_t slot;
    bool operator<(const Slot& other) const { return key < other.key; }
  };
  std::vector<Slot> slots;

  static uint64_t key(float score, int16_t token) {
    uint32_t bits;
    score += 0.0f;  // -0 and 0 tie
    __builtin_memcpy(&bits, &score, 4);
    bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;
    return uint64_t(bits) << 16 | uint16_t(token);
  }

  void run(const HeadType& type, const int32_t* blocks, int32_t head, int32_t prefix, int32_t drawn,
           int32_t due) {
    slots.clear();
    const int32_t resident = std::min(drawn, type.capacity), page = type.page, newest = drawn - type.recent;
    for (int32_t s = prefix; s < prefix + resident;) {
      const int32_t off = s % page, here = std::min(page - off, prefix + resident - s);
      const int64_t block = blocks[s / page];
      float* score = type.score + block * type.score_block + head * type.score_head + off;
      const int16_t* token = type.token + block * type.token_block + head * type.token_head + off;
      if (due > 0)
        for (int32_t i = 0; i < here; i++)
          if (token[i] >= type.anchors && token[i] < newest)
            slots.push_back({key(score[i], token[i]), s + i - prefix});
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

int32_t kvc_select(const HeadType* type, const int32_t* prefix, const int32_t* length, int32_t rows,
                   int32_t threads) {
  constexpr int32_t kChunk = 16;
  if (type->ring || !type->evicts) return 0;
  std::vector<int32_t> due;
  for (int32_t row = 0; row < rows; row++) {
    const int32_t drawn = length[row] - prefix[row];
    if (length[row] > 0 && drawn > 0 && drawn % type->line == 0) due.push_back(row);
  }
  const int64_t per_row = (type->heads + kChunk - 1) / kChunk, n = per_row * due.size();
#pragma omp parallel num_threads( \
        std::clamp<int64_t>(threads, 1, std::max<int64_t>(n, 1))) if (n > 1 && threads > 1)
  {
    Chooser chooser;
    chooser.slots.reserve(type->capacity);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < n; i++) {
      const int32_t row = due[i / per_row], first = i % per_row * kChunk;
      const int32_t drawn = length[row] - prefix[row];
      const int32_t victims = std::min(type->line, type->image - drawn) - std::max(0, type->capacity - drawn);
      for (int32_t head = first; head < std::min(first + kChunk, type->heads); head++)
        chooser.run(*type, type->block_table + row * type->table_row, head, prefix[row], drawn, victims);
    }
  }
  return due.size();
}
