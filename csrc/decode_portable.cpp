#include "abi.h"

#define KVC_LANES 4
#define KVC_WIDE 8

namespace {
#include "decode.inl"
}  // namespace

extern const RunFn kRun_portable = run_any;
