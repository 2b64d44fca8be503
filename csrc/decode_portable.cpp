#include "abi.h"

#define KVC_LANES 4
#define KVC_WIDE 8
#ifndef KVC_AHEAD
#define KVC_AHEAD 8192
#endif
#ifndef KVC_KICK
#define KVC_KICK 4
#endif

namespace {
#include "simd.inl"

#include "decode.inl"
}  // namespace

extern const DecodeFn kDecode_portable = decode_any;
