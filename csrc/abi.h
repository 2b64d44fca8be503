// The C interface between vllm_kvcompress/attention/cpu.py and the kernels. cpu.py mirrors these structs
// field by field with ctypes and checks kvc_abi() against its own number: raise both together.
#pragma once

#include <cstdint>

constexpr int32_t kAbi = 6;

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
  const int32_t* sized;        // [sizes, 5]: `capacity` to `recent` of pictures of each size; null: of one size
  int64_t kv_block, kv_head;
  int64_t score_block, score_head;
  int64_t token_block, token_head;
  int64_t victim_block, victim_head;
  int64_t table_row;
  int32_t heads, page;
  int32_t widest;  // the most `capacity` of any size
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
  const int32_t* begins;           // [rows, 2]: the first slot that a branch sees; null: 0
  const int32_t* size;             // [rows]: which of `sized` holds for a row; null: there is one size
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head;
  int32_t rows, group, dim, dtype;
  int32_t threads;
  int32_t kv_heads;  // Hkv: cache heads from here on are the other branch's
  float scale;
};

// Windows of drafts: the rows of a Step have several tokens each, and its tensors are [tokens, ...]. Its
// `length` counts a row's tokens up to the first of its window; those past its line's end can't be kept.
struct Window {
  const int32_t *start, *count;  // [rows]: where a row's tokens begin, and how many there are
  const int32_t* standing;       // [rows]: how many are to be kept; null: attend, and keep nothing yet
  float* const* mass;            // per type [rows, heads, places, widest + places]; null where not scored
  int32_t places;                // the most of any row
};

// One unit of work: heads [first, last) of one type in one row; `kind` is the type's number, `window` null in
// a decode step. `scratch` holds scratch_floats() floats.
using RunFn = void (*)(const Step&, const HeadType&, const Window* window, int32_t kind, int32_t row,
                       int32_t first, int32_t last, float* scratch);

// A tile is as many whole pages as fit, or a part of a long page.
constexpr int32_t kTile = 32;

// What follows is static, not just inline: the linker must never share a copy compiled for AVX-512.
static inline int64_t padded(int64_t count) { return (count + kTile - 1) / kTile * kTile; }

// Room for one query's logits: a tile is padded to whole vectors and may start anywhere.
static inline int64_t logits_of(int64_t slots) { return padded(slots) + kTile; }

// For every query of a chunk: logits, query, accumulator, running maximum and sum; one tile's weights for the
// `lanes` queries of a head; and the slots that a window's tokens take, one a lane at most.
static inline int64_t scratch_floats(int64_t slots, int64_t heads, int64_t lanes, int64_t dim) {
  return heads * lanes * (logits_of(slots) + 2 * padded(dim) + 3) + lanes * kTile;
}

// The type as it is for a row: itself, or with the numbers of the row's size, in `own`.
static inline const HeadType& of_row(const HeadType& type, const int32_t* size, int32_t row, HeadType& own) {
  if (!size || !type.sized) return type;
  own = type;
  const int32_t* numbers = type.sized + 5 * size[row];
  own.capacity = numbers[0], own.line = numbers[1], own.image = numbers[2];
  own.anchors = numbers[3], own.recent = numbers[4], own.evicts = own.capacity < own.image;
  return own;
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

// Slots in use before the first token of a row's window is written.
static inline int32_t held_slots(const HeadType& type, int32_t prefix, int32_t length) {
  const int32_t token = length - 1 - prefix;
  return prefix + (token < type.capacity ? token : type.capacity);
}

static inline float* mass_at(const Window& window, const HeadType& type, int32_t kind, int32_t row,
                             int32_t head, int32_t place) {
  const int64_t nth = (int64_t(row) * type.heads + head) * window.places + place;
  return window.mass[kind] + nth * (type.widest + window.places);
}

extern "C" {
#pragma GCC visibility push(default)
int32_t kvc_abi();
int32_t kvc_isa();
int32_t kvc_set_isa(int32_t isa);
int32_t kvc_max_threads();
int32_t kvc_decode(const HeadType* const* types, int32_t n_types, const Step* step);
int32_t kvc_window(const HeadType* const* types, int32_t n_types, const Step* step, const Window* window);
int32_t kvc_select(const HeadType* type, const int32_t* prefix, const int32_t* length, const int32_t* size,
                   int32_t rows, int32_t threads);
#pragma GCC visibility pop
}
