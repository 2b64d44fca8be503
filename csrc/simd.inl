// Vectors of kLanes floats on the compiler's vector extension; included once per instruction set, inside
// an anonymous namespace, after KVC_LANES is set. No std:: header here: an inline function compiled for
// AVX-512 could otherwise be the copy that the linker keeps for every caller.

constexpr int kLanes = KVC_LANES;
typedef float vf __attribute__((vector_size(4 * KVC_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * KVC_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * KVC_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * KVC_LANES)));

#define KVC_INLINE inline __attribute__((always_inline))
#define KVC_APART __attribute__((noinline))  // keeps the register allocation of an inner loop to itself

template <class V>
KVC_INLINE V load_raw(const void* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof(V));
  return x;
}

template <class V>
KVC_INLINE void store_raw(void* p, V x) {
  __builtin_memcpy(p, &x, sizeof(V));
}

KVC_INLINE vf as_float(vu x) { return (vf)x; }
KVC_INLINE vu as_bits(vf x) { return (vu)x; }
KVC_INLINE vf splat(float x) { return x - vf{}; }
KVC_INLINE vu pick(vi mask, vu yes, vu no) { return ((vu)mask & yes) | (~(vu)mask & no); }

// What compilers do badly on their own: 16-bit lanes to and from 32, float16, a sum over lanes.
#if KVC_LANES == 16
KVC_INLINE vu widen(const uint16_t* p) { return (vu)_mm512_cvtepu16_epi32(load_raw<__m256i>(p)); }
KVC_INLINE void narrow(uint16_t* p, vu x) { store_raw(p, _mm512_cvtepi32_epi16((__m512i)x)); }
KVC_INLINE vf load_half(const uint16_t* p) { return (vf)_mm512_cvtph_ps(load_raw<__m256i>(p)); }
KVC_INLINE void store_half(uint16_t* p, vf x) {
  store_raw(p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
KVC_INLINE __m256 fold(vf x) {
  return _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                       _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)x), 1)));
}
#elif KVC_LANES == 8
KVC_INLINE vu widen(const uint16_t* p) { return (vu)_mm256_cvtepu16_epi32(load_raw<__m128i>(p)); }
KVC_INLINE void narrow(uint16_t* p, vu x) {
  const __m256i pairs = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  store_raw(p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08)));
}
KVC_INLINE vf load_half(const uint16_t* p) { return (vf)_mm256_cvtph_ps(load_raw<__m128i>(p)); }
KVC_INLINE void store_half(uint16_t* p, vf x) {
  store_raw(p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
KVC_INLINE __m256 fold(vf x) { return (__m256)x; }
#else
KVC_INLINE vu widen(const uint16_t* p) { return __builtin_convertvector(load_raw<vh>(p), vu); }
KVC_INLINE void narrow(uint16_t* p, vu x) { store_raw(p, __builtin_convertvector(x, vh)); }
KVC_INLINE vf load_half(const uint16_t* p) {
  const vu half = widen(p), body = (half & 0x7fffu) << 13, exponent = body & 0x0f800000u;
  const vu normal = body + (112u << 23);
  const vu tiny = as_bits(as_float(normal + (1u << 23)) - as_float(vu{} + (113u << 23)));
  const vu finite = pick(exponent == 0u, tiny, normal);
  return as_float(pick(exponent == 0x0f800000u, normal + (112u << 23), finite) | ((half & 0x8000u) << 16));
}
KVC_INLINE void store_half(uint16_t* p, vf x) {
  const vu sign = as_bits(x) & 0x80000000u, body = as_bits(x) ^ sign;
  const vu tiny = as_bits(as_float(body) + 0.5f) - (126u << 23);
  const vu normal = (body + 0xc8000fffu + ((body >> 13) & 1u)) >> 13;
  const vu special = pick(body > 0x7f800000u, vu{} + 0x7e00u, vu{} + 0x7c00u);
  const vu finite = pick(body < (113u << 23), tiny, normal);
  narrow(p, pick(body >= (143u << 23), special, finite) | (sign >> 16));
}
#endif

#if KVC_LANES > 4
KVC_INLINE float sum(vf x) {
  const __m256 eight = fold(x);
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
KVC_INLINE float top(vf x) {
#if KVC_LANES == 16
  const __m512 whole = (__m512)x;
  __m256 eight = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(whole), 1));
  eight = _mm256_max_ps(eight, _mm512_castps512_ps256(whole));
#else
  const __m256 eight = (__m256)x;
#endif
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
KVC_INLINE void sum4(const vf x[4], float* to) {
  const __m256 ab = _mm256_hadd_ps(fold(x[0]), fold(x[1])), cd = _mm256_hadd_ps(fold(x[2]), fold(x[3]));
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
#else
KVC_INLINE float sum(vf x) { return (x[0] + x[1]) + (x[2] + x[3]); }
KVC_INLINE float top(vf x) {
  const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
  return a > b ? a : b;
}
KVC_INLINE void sum4(const vf x[4], float* to) {
  for (int i = 0; i < 4; i++) to[i] = sum(x[i]);
}
#endif

KVC_INLINE vf maximum(vf a, vf b) { return as_float(pick(a > b, as_bits(a), as_bits(b))); }

// exp(x) for x <= 0 within 2 ulp (Cephes' expf); below -87, -inf included: 0. NaN stays NaN.
KVC_INLINE vf exp_negative(vf x) {
  const vi dead = x <= -87.0f;
  const vf safe = as_float(pick(dead, vu{}, as_bits(x)));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf shifted = safe * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  vf r = safe - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return as_float(~(vu)dead & (as_bits(y) + (as_bits(shifted) << 23)));
}

// Element types: load to and store from float32 lanes, nearest-even.
struct F32 {
  typedef float raw;
  static KVC_INLINE vf load(const raw* p) { return load_raw<vf>(p); }
  static KVC_INLINE void store(raw* p, vf x) { store_raw(p, x); }
};

struct BF16 {
  typedef uint16_t raw;
  static KVC_INLINE vf load(const raw* p) { return as_float(widen(p) << 16); }
  static KVC_INLINE void store(raw* p, vf x) {
    const vu bits = as_bits(x);
    narrow(p, pick(x == x, (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, vu{} + 0x7fc0u));
  }
};

struct F16 {
  typedef uint16_t raw;
  static KVC_INLINE vf load(const raw* p) { return load_half(p); }
  static KVC_INLINE void store(raw* p, vf x) { store_half(p, x); }
};

// One element at a time, for head sizes that are no multiple of kLanes. Out of line: rare and bulky.
template <class T>
KVC_APART float load_one(const typename T::raw* p) {
  typename T::raw lanes[KVC_LANES] = {};
  lanes[0] = *p;
  return T::load(lanes)[0];
}

template <class T>
KVC_APART void store_one(typename T::raw* p, float x) {
  typename T::raw lanes[KVC_LANES];
  T::store(lanes, splat(x));
  *p = lanes[0];
}
