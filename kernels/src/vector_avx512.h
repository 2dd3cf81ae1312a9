// Vectors of four floats in each of four 128-bit lanes: AVX-512 F, BW, CD, DQ and VL.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace qengine {
namespace {

constexpr size_t kLanes = 4;

using Floats = __m512;
using Ints = __m512i;

inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Ints splat_bits(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Ints bits(Floats x) { return _mm512_castps_si512(x); }
inline Floats floats(Ints x) { return _mm512_castsi512_ps(x); }

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints larger(Ints a, Ints b) { return _mm512_max_epu32(a, b); }
template <int N>
inline Ints shifted_right(Ints a) {
    return _mm512_srli_epi32(a, N);
}

inline Floats reversed(Floats x) { return _mm512_permute_ps(x, 0x1B); }
inline Floats pairs_swapped(Floats x) { return _mm512_permute_ps(x, 0xB1); }
inline Floats halves_swapped(Floats x) { return _mm512_permute_ps(x, 0x4E); }

inline uint32_t largest(Ints x) {
    alignas(64) uint32_t values[16];
    _mm512_store_si512(values, x);
    uint32_t found = 0;
    for (const uint32_t value : values) found = value > found ? value : found;
    return found;
}

inline Floats load(const float* from) { return _mm512_load_ps(from); }
inline void store(float* to, Floats x) { _mm512_store_ps(to, x); }

inline __m128i load128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

template <class T>
inline __m512i load_lanes(const T* from, size_t stride) {
    __m512i x = _mm512_castsi128_si512(load128(from));
    x = _mm512_inserti32x4(x, load128(from + stride), 1);
    x = _mm512_inserti32x4(x, load128(from + 2 * stride), 2);
    return _mm512_inserti32x4(x, load128(from + 3 * stride), 3);
}

inline void load16(const float* from, size_t stride, Floats out[4]) {
    for (int a = 0; a < 4; ++a) out[a] = floats(load_lanes(from + 4 * a, stride));
}

inline void load16(const Bfloat* from, size_t stride, Floats out[4]) {
    const __m512i zero = _mm512_setzero_si512();
    for (int a = 0; a < 2; ++a) {
        const __m512i x = load_lanes(from + 8 * a, stride);
        out[2 * a] = floats(_mm512_unpacklo_epi16(zero, x));
        out[2 * a + 1] = floats(_mm512_unpackhi_epi16(zero, x));
    }
}

inline __m256i joined(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

inline void load16(const Half* from, size_t stride, Floats out[4]) {
    for (int a = 0; a < 2; ++a) {
        const __m128i x0 = load128(from + 8 * a), x1 = load128(from + stride + 8 * a);
        const __m128i x2 = load128(from + 2 * stride + 8 * a), x3 = load128(from + 3 * stride + 8 * a);
        out[2 * a] = _mm512_cvtph_ps(joined(_mm_unpacklo_epi64(x0, x1), _mm_unpacklo_epi64(x2, x3)));
        out[2 * a + 1] = _mm512_cvtph_ps(joined(_mm_unpackhi_epi64(x0, x1), _mm_unpackhi_epi64(x2, x3)));
    }
}

inline void store_lane(__m128i x, uint8_t* to, bool stream) {
    if (stream) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(to), x);
    } else {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), x);
    }
}

inline void store_lanes(__m512i x, uint8_t* to, size_t stride, bool stream) {
    store_lane(_mm512_castsi512_si128(x), to, stream);
    store_lane(_mm512_extracti32x4_epi32(x, 1), to + stride, stream);
    store_lane(_mm512_extracti32x4_epi32(x, 2), to + 2 * stride, stream);
    store_lane(_mm512_extracti32x4_epi32(x, 3), to + 3 * stride, stream);
}

inline __m512i packed(__m512i a, __m512i b, __m512i c, __m512i d) {
    return _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}

inline void store16_int8(const Floats x[4], uint8_t* to, size_t stride, bool stream) {
    const __m512i bytes = packed(_mm512_cvtps_epi32(x[0]), _mm512_cvtps_epi32(x[1]), _mm512_cvtps_epi32(x[2]),
                                 _mm512_cvtps_epi32(x[3]));
    store_lanes(_mm512_max_epi8(bytes, _mm512_set1_epi8(-127)), to, stride, stream);
}

inline void store16_e4m3(const Ints code[4], const Floats x[4], uint8_t* to, size_t stride, bool stream) {
    const __m512i signs = packed(bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3]));  // saturation keeps the sign
    const __m512i bytes = packed(code[0], code[1], code[2], code[3]);
    store_lanes(_mm512_or_si512(bytes, _mm512_and_si512(signs, _mm512_set1_epi8(-128))), to, stride, stream);
}

template <class T>
inline void widen(const T* from, float* to, size_t count) {
    for (size_t i = 0; i < count; ++i) to[i] = widened(from[i]);
}

inline void widen(const Half* from, float* to, size_t count) {
    size_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(load128(from + i)));
    for (; i < count; ++i) to[i] = widened(from[i]);
}

inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T1); }
inline void fence() { _mm_sfence(); }

}  // namespace
}  // namespace qengine
