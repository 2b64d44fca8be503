#include <immintrin.h>

#include "abi.h"

#define KVC_LANES 8
#define KVC_WIDE 8

namespace {
#include "decode.inl"
}  // namespace

extern const RunFn kRun_avx2 = run_any;
