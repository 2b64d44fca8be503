#include <immintrin.h>

#include "abi.h"

#define KVC_LANES 8
#define KVC_WIDE 8

namespace {
#include "decode.inl"
}  // namespace

extern const DecodeFn kDecode_avx2 = decode_any;
