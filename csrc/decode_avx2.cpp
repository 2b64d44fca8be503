#include "abi.h"
#include <immintrin.h>
#define KVC_LANES 8
#define KVC_WIDE 8

namespace {
#include "simd.inl"

#include "decode.inl"
}  // namespace

extern const DecodeFn kDecode_avx2 = decode_any;
