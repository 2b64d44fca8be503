#include <immintrin.h>

#include "abi.h"

#define KVC_LANES 16
#define KVC_WIDE 16

namespace {
#include "decode.inl"
}  // namespace

extern const RunFn kRun_avx512 = run_any;
