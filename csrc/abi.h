// The C interface between vllm_kvcompress/attention/cpu.py and the kernels. cpu.py mirrors these structs
// field by field with ctypes and checks kvc_abi() against its own number: raise both together.
#pragma once

#include <cstdint>

constexpr int32_t kAbi = 3;

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// All heads of one type in one layer (decode) or in all layers (select). Strides count elements.
struct HeadType {
  char* kv;                    // [blocks, heads, page, 2 * D], K then V; [page, 2 * D] is contiguous
  float* score;                // [blocks, heads, page]; this and the next two: only where slots are scored
  int16_t* token;              // [blocks, heads, page]; -1 for the prefix
  int16_t* victim;             // [blocks, heads, page]; at a row's logical slot j: its j-th victim
  const int32_t* head_index;   // [heads]: position on the 2 * Hkv axis of k and v (decode only)
  const int32_t* block_table;  // [rows, max_blocks]
  int64_t kv_block, kv_head;
  int64_t score_block, score_head;
  int64_t token_block, token_head;
  int64_t victim_block, victim_head;
  int64_t table_row;
  int32_t heads, page;
  int32_t capacity, line, image, anchors, recent;
  int32_t ring, evicts;
  int32_t dim, dtype;              // of kv
  int32_t value_norm, smooth_row;  // refinements of the score (select only)
  float decay;                     // what a line's end leaves of a score
};

// One step's rows. Query head g of cache head c is head_index[c] * group + g.
struct Step {
  const char *q, *k, *v;           // [rows, 2 * Hq, D], [rows, 2 * Hkv, D] twice; D is contiguous
  char* out;                       // [rows, 2 * Hq, D]
  const int32_t *prefix, *length;  // [rows]; length 0 is a padding row
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head;
  int32_t rows, group, dim, dtype;
  int32_t threads;
  float scale;
};

// One unit of work: heads [first, last) of one type in one row. `scratch` holds scratch_floats() floats.
using DecodeFn = void (*)(const Step&, const HeadType&, int32_t row, int32_t first, int32_t last,
                          float* scratch);

// A tile is as many whole pages as fit, or a part of a long page.
constexpr int32_t kTile = 32;

// What follows is static, not just inline: the linker must never share a copy compiled for AVX-512.
static inline int64_t padded(int64_t count) { return (count + kTile - 1) / kTile * kTile; }

// Room for one query's logits: a tile is padded to whole vectors and may start anywhere.
static inline int64_t logits_of(int64_t slots) { return padded(slots) + kTile; }

// For every query of a chunk: logits, query, accumulator, running maximum and sum; and one tile's weights for
// the queries of a group.
static inline int64_t scratch_floats(int64_t slots, int64_t heads, int64_t group, int64_t dim) {
  return heads * group * (logits_of(slots) + 2 * padded(dim) + 2) + group * kTile;
}

// Where a row stands: arithmetic on (prefix, length) only, the same for both branches and all layers.
struct Phase {
  int32_t token;     // image-token index of this step's token; -1 for a prefix token
  int32_t resident;  // slots to attend over
  int32_t slot;      // where this step's token goes, or -1: victim number `nth` of each head
  int32_t nth;
};

static inline Phase phase_of(const HeadType& type, int32_t prefix, int32_t length) {
  const int32_t t = length - 1 - prefix;
  if (t < type.capacity) return {t < 0 ? -1 : t, length, length - 1, 0};
  const int32_t resident = prefix + type.capacity;
  if (type.ring) {
    const int32_t lap = type.capacity > type.anchors ? type.capacity - type.anchors : 1;
    return {t, resident, prefix + type.anchors + (t - type.anchors) % lap, 0};
  }
  const int32_t position = t % type.line;
  const int32_t free = type.capacity > t - position ? type.capacity - (t - position) : 0;
  return {t, resident, -1, position - free};
}

extern "C" {
#pragma GCC visibility push(default)
int32_t kvc_abi();
int32_t kvc_isa();
int32_t kvc_set_isa(int32_t isa);
int32_t kvc_max_threads();
int32_t kvc_decode(const HeadType* const* types, int32_t n_types, const Step* step);
int32_t kvc_select(const HeadType* type, const int32_t* prefix, const int32_t* length, int32_t rows,
                   int32_t threads);
#pragma GCC visibility pop
}
