// Entry points: choice of the instruction set at run time, division of the work over threads.

#include <omp.h>

#include <algorithm>
#include <cstdlib>

#include "abi.h"

extern const RunFn kRun_portable;
#ifdef KVC_X86
extern const RunFn kRun_avx2, kRun_avx512;
#endif

namespace {

int32_t best_isa() {
#ifdef KVC_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return kAvx2;
#endif
  return kPortable;
}

int32_t isa = best_isa();

RunFn run_fn() {
#ifdef KVC_X86
  if (isa == kAvx512) return kRun_avx512;
  if (isa == kAvx2) return kRun_avx2;
#endif
  return kRun_portable;
}

// Grows and stays for the life of its thread: no allocation in a decode step after the first.
float* scratch_of(int64_t floats) {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffer;
  if (buffer.size < floats) {
    std::free(buffer.data);
    buffer.size = (floats + 1023) / 1024 * 1024;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, buffer.size * sizeof(float)));
    if (!buffer.data) buffer.size = 0;
  }
  return buffer.data;
}

int32_t slots_of(const HeadType& type, int32_t prefix, int32_t length) {
  return length > 0 ? phase_of(type, prefix, length).resident : 0;
}

}  // namespace

int32_t kvc_abi() { return kAbi; }

int32_t kvc_isa() { return isa; }

int32_t kvc_set_isa(int32_t wanted) { return isa = std::clamp<int32_t>(wanted, kPortable, best_isa()); }

int32_t kvc_max_threads() { return omp_get_max_threads(); }

static int32_t run(const HeadType* const* types, int32_t n_types, const Step* step, const Window* window) {
  const RunFn run = run_fn();
  int32_t heads = 0, slots = 0;
  const int32_t lanes = step->group * (window ? window->places : 1);
  HeadType sized;
  for (int32_t i = 0; i < n_types; i++) {
    heads += types[i]->heads;
    for (int32_t row = 0; row < step->rows; row++) {
      const HeadType& type = of_row(*types[i], step->size, row, sized);
      slots = std::max(slots, slots_of(type, step->prefix[row], step->length[row]));
    }
  }
  if (window) slots += window->places;
  // Heads of one page lie side by side, so a chunk wants many; four chunks a thread keep them all busy.
  const int64_t all = int64_t(heads) * step->rows, threads = std::max<int64_t>(1, step->threads);
  // Their queries and accumulators should stay in the L1 cache.
  const int32_t most = std::max(window ? 1 : 4, 16 / lanes);
  const int32_t chunk = std::clamp<int64_t>(all / (4 * threads), 1, most);
  int32_t per_row = 0;
  for (int32_t i = 0; i < n_types; i++) per_row += (types[i]->heads + chunk - 1) / chunk;
  const int64_t floats = scratch_floats(slots, chunk, lanes, step->dim), n = int64_t(per_row) * step->rows;
  int32_t failed = 0;
#pragma omp parallel num_threads(std::min(threads, n)) reduction(| : failed) if (n > 1 && threads > 1)
  {
    float* scratch = scratch_of(floats);
    failed = !scratch;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < n; i++) {
      if (failed) continue;
      int32_t part = i % per_row, kind = 0;
      for (int32_t count; part >= (count = (types[kind]->heads + chunk - 1) / chunk); kind++) part -= count;
      const int32_t first = part * chunk, row = i / per_row;
      HeadType own;
      const HeadType& type = of_row(*types[kind], step->size, row, own);
      run(*step, type, window, kind, row, first, std::min(first + chunk, type.heads), scratch);
    }
  }
  return failed;
}

int32_t kvc_decode(const HeadType* const* types, int32_t n_types, const Step* step) {
  return run(types, n_types, step, nullptr);
}

int32_t kvc_window(const HeadType* const* types, int32_t n_types, const Step* step, const Window* window) {
  return run(types, n_types, step, window);
}
