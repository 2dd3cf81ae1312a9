// Vectors of four floats per lane, one lane, in plain C++.
#pragma once

#include "scalar.h"

namespace qengine {
namespace {

constexpr size_t kLanes = 1;

struct Floats {
    float v[4];
};

struct Ints {
    uint32_t v[4];
};

template <class Out, class In, class Op>
inline Out each(const In& a, Op op) {
    Out out;
    for (int i = 0; i < 4; ++i) out.v[i] = op(a.v[i]);
    return out;
}

template <class In, class Op>
inline In each(const In& a, const In& b, Op op) {
    In out;
    for (int i = 0; i < 4; ++i) out.v[i] = op(a.v[i], b.v[i]);
    return out;
}

inline Floats splat(float x) { return {{x, x, x, x}}; }
inline Ints splat_bits(uint32_t x) { return {{x, x, x, x}}; }
inline Ints bits(const Floats& x) { return each<Ints>(x, to_bits); }
inline Floats floats(const Ints& x) { return each<Floats>(x, from_bits); }

inline Floats add(const Floats& a, const Floats& b) {
    return each(a, b, [](float x, float y) { return x + y; });
}
inline Floats sub(const Floats& a, const Floats& b) {
    return each(a, b, [](float x, float y) { return x - y; });
}
inline Floats mul(const Floats& a, const Floats& b) {
    return each(a, b, [](float x, float y) { return x * y; });
}
inline Floats div(const Floats& a, const Floats& b) {
    return each(a, b, [](float x, float y) { return x / y; });
}
inline Ints both(const Ints& a, const Ints& b) {
    return each(a, b, [](uint32_t x, uint32_t y) { return x & y; });
}
inline Ints plus(const Ints& a, const Ints& b) {
    return each(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
inline Ints minus(const Ints& a, const Ints& b) {
    return each(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
inline Ints larger(const Ints& a, const Ints& b) {
    return each(a, b, [](uint32_t x, uint32_t y) { return x > y ? x : y; });
}
template <int N>
inline Ints shifted_right(const Ints& a) {
    return each<Ints>(a, [](uint32_t x) { return x >> N; });
}

inline Floats reversed(const Floats& x) { return {{x.v[3], x.v[2], x.v[1], x.v[0]}}; }
inline Floats pairs_swapped(const Floats& x) { return {{x.v[1], x.v[0], x.v[3], x.v[2]}}; }
inline Floats halves_swapped(const Floats& x) { return {{x.v[2], x.v[3], x.v[0], x.v[1]}}; }

inline uint32_t largest(const Ints& x) {
    uint32_t found = 0;
    for (const uint32_t value : x.v) found = value > found ? value : found;
    return found;
}

inline Floats load(const float* from) { return {{from[0], from[1], from[2], from[3]}}; }
inline void store(float* to, const Floats& x) { memcpy(to, x.v, sizeof x.v); }

template <class T>
inline void load16(const T* from, size_t, Floats out[4]) {
    for (int a = 0; a < 4; ++a) {
        for (int i = 0; i < 4; ++i) out[a].v[i] = widened(from[4 * a + i]);
    }
}

inline void store16_int8(const Floats x[4], uint8_t* to, size_t, bool) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, halves to even
    for (int a = 0; a < 4; ++a) {
        for (int i = 0; i < 4; ++i) {
            const float whole = (x[a].v[i] + kMagic) - kMagic;
            const float clamped = whole < -127.0f ? -127.0f : whole > 127.0f ? 127.0f : whole;
            to[4 * a + i] = static_cast<uint8_t>(static_cast<int32_t>(clamped));
        }
    }
}

inline void store16_e4m3(const Ints code[4], const Floats x[4], uint8_t* to, size_t, bool) {
    for (int a = 0; a < 4; ++a) {
        for (int i = 0; i < 4; ++i) to[4 * a + i] = static_cast<uint8_t>(code[a].v[i] | (to_bits(x[a].v[i]) >> 24 & 0x80u));
    }
}

template <class T>
inline void widen(const T* from, float* to, size_t count) {
    for (size_t i = 0; i < count; ++i) to[i] = widened(from[i]);
}

inline void prefetch(const void*) {}
inline void fence() {}

}  // namespace
}  // namespace qengine
