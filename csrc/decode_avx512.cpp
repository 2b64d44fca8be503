#include <immintrin.h>

#include "abi.h"

#define KVC_LANES 16
#define KVC_WIDE 16

namespace {
#include "decode.inl"
}  // namespace

extern const DecodeFn kDecode_avx512 = decode_any;
