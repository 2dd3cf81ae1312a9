// Rows to bytes: rotation, the largest magnitude, the scale, the quotients. Included after one vector_*.h.
//
// A row is worked on in chunks of kLanes spans, one span per 128-bit lane: a span holds whole rotation groups, so all
// stages but the first run on whole vectors, and sixteen values per lane pack into sixteen bytes in their order. A row
// that no number of chunks fills is finished in a chunk padded with zeros, which change neither groups nor magnitudes.
// The float operations and their order are those of kernels/quant/reference.py, so the bits are too.
#pragma once

#include "paths.h"

namespace qengine {
namespace {

struct E4m3 {
    static constexpr float kLimit = 448.0f;
};

struct Int8 {
    static constexpr float kLimit = 127.0f;
};

template <unsigned group>
constexpr size_t span_of() {
    return group < 16 ? 16 : group;
}

constexpr size_t kFloats = 4 * kLanes;  // of a vector

// y_j = (x0 + x1 + x2 + x3) / 2 - x_{3 - j} on neighbours inside every lane.
inline Floats rotated_inside(Floats x) {
    const Floats pairs = add(x, pairs_swapped(x));
    const Floats sums = add(pairs, halves_swapped(pairs));
    return sub(mul(sums, splat(0.5f)), reversed(x));
}

// The same on four vectors, step apart.
inline void rotate_across(Floats* x, size_t step) {
    const Floats x0 = x[0], x1 = x[step], x2 = x[2 * step], x3 = x[3 * step];
    const Floats half = mul(add(add(x0, x1), add(x2, x3)), splat(0.5f));
    x[0] = sub(half, x3);
    x[step] = sub(half, x2);
    x[2 * step] = sub(half, x1);
    x[3 * step] = sub(half, x0);
}

inline Ints widest(Ints most, Floats x) { return larger(most, both(bits(x), splat_bits(0x7FFFFFFFu))); }

// One stage on four vectors of scratch, step floats apart, in place; magnitudes after the last stage.
template <bool last>
inline Ints rotate_stored(float* at, size_t step, Ints most) {
    Floats x[4];
    for (size_t i = 0; i < 4; ++i) x[i] = load(at + i * step);
    rotate_across(x, 1);
    for (size_t i = 0; i < 4; ++i) {
        if constexpr (last) most = widest(most, x[i]);
        store(at + i * step, x[i]);
    }
    return most;
}

// Stages of 16 (and 64) on a span that is already rotated in groups of 16, in place.
template <unsigned group>
inline Ints rotate_far(float* span, Ints most) {
    for (size_t i = 0; i < group / 4; i += 16) {
        for (size_t r = 0; r < 4; ++r) most = rotate_stored<group == 64>(span + (i + r) * kFloats, 4 * kFloats, most);
    }
    if constexpr (group == 256) {
        for (size_t i = 0; i < 16; ++i) most = rotate_stored<true>(span + i * kFloats, 16 * kFloats, most);
    }
    return most;
}

// Rotate a chunk into scratch (with group 1: do not, and write nothing); magnitudes as bits, which order NaN highest.
template <class T, unsigned group>
inline Ints rotate_chunk(const T* chunk, float* rotated, Ints most) {
    constexpr size_t span = span_of<group>();
    for (size_t start = 0; start < span; start += 16) {
        Floats x[4];
        load16(chunk + start, span, x);
        if constexpr (group >= 4) {
            for (Floats& part : x) part = rotated_inside(part);
        }
        if constexpr (group >= 16) rotate_across(x, 1);
        for (size_t a = 0; a < 4; ++a) {
            if constexpr (group <= 16) most = widest(most, x[a]);
            if constexpr (group >= 4) store(rotated + (start / 4 + a) * kFloats, x[a]);
        }
    }
    if constexpr (group >= 64) most = rotate_far<group>(rotated, most);
    return most;
}

// The e4m3 codes, without signs, of values whose magnitude is below 464, halves to even. A power of two whose last bit
// is worth the code's own step is added, so that the addition rounds; its last bits then are the code.
inline Ints e4m3_codes(Floats x) {
    constexpr uint32_t kLeast = 121u << 23;  // 2^-6: smaller values share its step
    const Ints size = both(bits(x), splat_bits(0x7FFFFFFFu));
    const Ints power = larger(both(size, splat_bits(0x7F800000u)), splat_bits(kLeast));
    const Ints magic = plus(power, splat_bits(20u << 23));
    const Ints steps = minus(bits(add(floats(size), floats(magic))), magic);
    return plus(steps, shifted_right<20>(minus(power, splat_bits(kLeast))));
}

inline void store16(Int8, const Floats x[4], uint8_t* to, size_t span, bool stream) { store16_int8(x, to, span, stream); }

inline void store16(E4m3, const Floats x[4], uint8_t* to, size_t span, bool stream) {
    const Ints codes[4] = {e4m3_codes(x[0]), e4m3_codes(x[1]), e4m3_codes(x[2]), e4m3_codes(x[3])};
    store16_e4m3(codes, x, to, span, stream);
}

struct Row {
    float scale;
    const char* soon;  // what the next row is read from
    bool stream;
};

template <class T, unsigned group, class Stored>
inline void store_chunk(const T* chunk, const float* rotated, const Row& row, uint8_t* to) {
    constexpr size_t span = span_of<group>();
    const Floats scale = splat(row.scale);
    const char* soon = row.soon;
    for (size_t start = 0; start < span; start += 16) {
        Floats x[4];
        if constexpr (group == 1) {
            load16(chunk + start, span, x);
        } else {
            for (size_t a = 0; a < 4; ++a) x[a] = load(rotated + (start / 4 + a) * kFloats);
        }
        for (size_t line = 0; line < 16 * kLanes * sizeof(T); line += 64) prefetch(soon + line);
        soon += 16 * kLanes * sizeof(T);
        for (Floats& part : x) part = div(part, scale);
        store16(Stored(), x, to + start, span, row.stream);
    }
}

// Any quotient, of any scale: a NaN, an infinity, or one that a denormal scale has let grow past the limit.
inline uint8_t stored_value(Int8, float x) {
    constexpr float kMagic = 12582912.0f;
    if (!(x == x)) return 0;
    if (x >= 127.0f) return 127;
    if (x <= -127.0f) return static_cast<uint8_t>(-127);
    return static_cast<uint8_t>(static_cast<int32_t>((x + kMagic) - kMagic));
}

inline uint8_t stored_value(E4m3, float x) {
    const uint32_t sign = to_bits(x) >> 24 & 0x80u;
    if (!(x == x)) return static_cast<uint8_t>(sign | 0x7Fu);
    const float size = from_bits(to_bits(x) & 0x7FFFFFFFu);
    const float clamped = size > E4m3::kLimit ? E4m3::kLimit : size;
    uint32_t power = to_bits(clamped) & 0x7F800000u;
    if (power < 121u << 23) power = 121u << 23;
    const uint32_t magic = power + (20u << 23);
    const uint32_t steps = to_bits(clamped + from_bits(magic)) - magic;
    return static_cast<uint8_t>(sign | (steps + ((power - (121u << 23)) >> 20)));
}

// A value of a row: out of the source, or out of scratch where rotate_chunk has put it.
template <class T, unsigned group>
inline float value_at(const T* row, const float* rotated, size_t column) {
    if constexpr (group == 1) return widened(row[column]);
    constexpr size_t span = span_of<group>();
    const size_t chunk = column / (span * kLanes), lane = column / span % kLanes, inside = column % span;
    return rotated[chunk * span * kLanes + inside / 4 * kFloats + lane * 4 + inside % 4];
}

template <class Stored>
inline float write_scale(const QuantiseJob& job, size_t row, float most) {
    float scale = most / Stored::kLimit;
    if (job.scale_dtype == QENGINE_BFLOAT16) scale = widened(to_bfloat(scale));
    if (scale == 0.0f) scale = 1.0f;
    if (job.scale_dtype == QENGINE_BFLOAT16) {
        static_cast<Bfloat*>(job.scale)[row] = to_bfloat(scale);
    } else {
        static_cast<float*>(job.scale)[row] = scale;
    }
    return scale;
}

// A scale that is neither denormal, which would let quotients grow past the limit, nor infinite or NaN.
inline bool ordinary(float scale) { return scale >= 0x1p-126f && scale <= 0x1.fffffep127f; }

template <class T>
inline void padded(const T* from, size_t count, T* to, size_t room) {
    memset(to, 0, room * sizeof(T));
    memcpy(to, from, count * sizeof(T));
}

template <class T, unsigned group, class Stored>
void quantise_rows(const QuantiseJob& job, size_t begin, size_t end, float* scratch) {
    constexpr size_t chunk = span_of<group>() * kLanes;
    const size_t columns = job.x.columns, whole = columns / chunk * chunk, rest = columns - whole;
    const T* data = static_cast<const T*>(job.x.data);
    alignas(64) T tail[chunk];
    alignas(64) uint8_t tail_stored[chunk];
    for (size_t row = begin; row < end; ++row) {
        const T* x = data + row * job.x.row_stride;
        uint8_t* to = job.stored + row * columns;
        Ints most = splat_bits(0);
        for (size_t at = 0; at < whole; at += chunk) most = rotate_chunk<T, group>(x + at, scratch + at, most);
        if (rest) {
            padded(x + whole, rest, tail, chunk);
            most = rotate_chunk<T, group>(tail, scratch + whole, most);
        }
        const float scale = write_scale<Stored>(job, row, from_bits(largest(most)));
        if (!ordinary(scale)) {
            for (size_t i = 0; i < columns; ++i) {
                to[i] = stored_value(Stored(), value_at<T, group>(x, scratch, i) / scale);
            }
            continue;
        }
        const T* next = row + 1 < end ? x + job.x.row_stride : x;
        for (size_t at = 0; at < whole; at += chunk) {
            const Row one = {scale, reinterpret_cast<const char*>(next + at), job.stream};
            store_chunk<T, group, Stored>(x + at, scratch + at, one, to + at);
        }
        if (rest) {
            const Row one = {scale, reinterpret_cast<const char*>(x + whole), false};
            store_chunk<T, group, Stored>(tail, scratch + whole, one, tail_stored);
            memcpy(to + whole, tail_stored, rest);
        }
    }
    fence();
}

template <class T, class Stored>
void quantise_group(const QuantiseJob& job, size_t begin, size_t end, float* scratch) {
    switch (job.group) {
        case 4:
            return quantise_rows<T, 4, Stored>(job, begin, end, scratch);
        case 16:
            return quantise_rows<T, 16, Stored>(job, begin, end, scratch);
        case 64:
            return quantise_rows<T, 64, Stored>(job, begin, end, scratch);
        case 256:
            return quantise_rows<T, 256, Stored>(job, begin, end, scratch);
        default:
            return quantise_rows<T, 1, Stored>(job, begin, end, scratch);
    }
}

template <class T>
void quantise_as(const QuantiseJob& job, size_t begin, size_t end, float* scratch) {
    if (job.stored_format == QENGINE_E4M3) return quantise_rows<T, 1, E4m3>(job, begin, end, scratch);
    quantise_group<T, Int8>(job, begin, end, scratch);
}

void quantise(const QuantiseJob& job, size_t begin, size_t end, float* scratch) {
    switch (job.x.dtype) {
        case QENGINE_BFLOAT16:
            return quantise_as<Bfloat>(job, begin, end, scratch);
        case QENGINE_FLOAT16:
            return quantise_as<Half>(job, begin, end, scratch);
        default:
            return quantise_as<float>(job, begin, end, scratch);
    }
}

size_t quantise_scratch(size_t columns, uint32_t group) {
    if (group == 1) return 0;
    const size_t chunk = (group < 16 ? 16 : group) * kLanes;
    return (columns + chunk - 1) / chunk * chunk;
}

}  // namespace
}  // namespace qengine
