// One value at a time: conversions between the float formats. Internal linkage, because every instruction set compiles
// its own copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef _MSC_VER
#pragma fp_contract(off)
#endif

namespace qengine {
namespace {

struct Bfloat {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

inline float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float widened(float value) { return value; }

inline float widened(Bfloat value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }

inline float widened(Half value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t rest = value.bits & 0x7FFFu;
    if (rest >= 0x7C00u) return from_bits(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
    if (rest >= 0x400u) return from_bits(sign | ((rest << 13) + 0x38000000u));
    return from_bits(sign | to_bits(static_cast<float>(rest) * 0x1p-24f));
}

// Halves round to even; a NaN stays one.
inline Bfloat to_bfloat(float value) {
    const uint32_t bits = to_bits(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FC0u};
    return {static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16)};
}

inline Half to_half(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const uint32_t rest = bits & 0x7FFFFFFFu;
    if (rest > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
    if (rest >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};  // 65520 and above
    if (rest < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which this addition rounds to
        const uint32_t steps = to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f);
        return {static_cast<uint16_t>(sign | steps)};
    }
    return {static_cast<uint16_t>(sign | (rest - 0x38000000u + 0xFFFu + (rest >> 13 & 1u)) >> 13)};
}

inline void narrow(float value, float* target) { *target = value; }
inline void narrow(float value, Bfloat* target) { *target = to_bfloat(value); }
inline void narrow(float value, Half* target) { *target = to_half(value); }

}  // namespace
}  // namespace qengine
