// Vectors of four floats in each of two 128-bit lanes: AVX2 and F16C.
#pragma once

#include <immintrin.h>

#include "scalar.h"

namespace qengine {
namespace {

constexpr size_t kLanes = 2;

using Floats = __m256;
using Ints = __m256i;

inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Ints splat_bits(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Ints bits(Floats x) { return _mm256_castps_si256(x); }
inline Floats floats(Ints x) { return _mm256_castsi256_ps(x); }

inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints plus(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints minus(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints larger(Ints a, Ints b) { return _mm256_max_epu32(a, b); }
template <int N>
inline Ints shifted_right(Ints a) {
    return _mm256_srli_epi32(a, N);
}

inline Floats reversed(Floats x) { return _mm256_permute_ps(x, 0x1B); }
inline Floats pairs_swapped(Floats x) { return _mm256_permute_ps(x, 0xB1); }
inline Floats halves_swapped(Floats x) { return _mm256_permute_ps(x, 0x4E); }

inline uint32_t largest(Ints x) {
    alignas(32) uint32_t values[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(values), x);
    uint32_t found = 0;
    for (const uint32_t value : values) found = value > found ? value : found;
    return found;
}

inline Floats load(const float* from) { return _mm256_load_ps(from); }
inline void store(float* to, Floats x) { _mm256_store_ps(to, x); }

inline __m128i load128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

inline __m256i load_lanes(const void* low, const void* high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(load128(low)), load128(high), 1);
}

inline void load16(const float* from, size_t stride, Floats out[4]) {
    for (int a = 0; a < 4; ++a) out[a] = floats(load_lanes(from + 4 * a, from + stride + 4 * a));
}

inline void load16(const Bfloat* from, size_t stride, Floats out[4]) {
    const __m256i zero = _mm256_setzero_si256();
    for (int a = 0; a < 2; ++a) {
        const __m256i x = load_lanes(from + 8 * a, from + stride + 8 * a);
        out[2 * a] = floats(_mm256_unpacklo_epi16(zero, x));
        out[2 * a + 1] = floats(_mm256_unpackhi_epi16(zero, x));
    }
}

inline void load16(const Half* from, size_t stride, Floats out[4]) {
    for (int a = 0; a < 2; ++a) {
        const __m128i low = load128(from + 8 * a), high = load128(from + stride + 8 * a);
        out[2 * a] = _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
        out[2 * a + 1] = _mm256_cvtph_ps(_mm_unpackhi_epi64(low, high));
    }
}

inline void store_lanes(__m256i x, uint8_t* to, size_t stride, bool stream) {
    __m128i* low = reinterpret_cast<__m128i*>(to);
    __m128i* high = reinterpret_cast<__m128i*>(to + stride);
    if (stream) {
        _mm_stream_si128(low, _mm256_castsi256_si128(x));
        _mm_stream_si128(high, _mm256_extracti128_si256(x, 1));
    } else {
        _mm_storeu_si128(low, _mm256_castsi256_si128(x));
        _mm_storeu_si128(high, _mm256_extracti128_si256(x, 1));
    }
}

inline __m256i packed(__m256i a, __m256i b, __m256i c, __m256i d) {
    return _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
}

inline void store16_int8(const Floats x[4], uint8_t* to, size_t stride, bool stream) {
    const __m256i bytes = packed(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]), _mm256_cvtps_epi32(x[2]),
                                 _mm256_cvtps_epi32(x[3]));
    store_lanes(_mm256_max_epi8(bytes, _mm256_set1_epi8(-127)), to, stride, stream);
}

inline void store16_e4m3(const Ints code[4], const Floats x[4], uint8_t* to, size_t stride, bool stream) {
    const __m256i signs = packed(bits(x[0]), bits(x[1]), bits(x[2]), bits(x[3]));  // saturation keeps the sign
    const __m256i bytes = packed(code[0], code[1], code[2], code[3]);
    store_lanes(_mm256_or_si256(bytes, _mm256_and_si256(signs, _mm256_set1_epi8(-128))), to, stride, stream);
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
