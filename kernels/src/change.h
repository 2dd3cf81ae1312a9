// Where two latents differ: their difference, blurred along the rows and then down the columns, its magnitude, the mean
// over channels. Included after one vector_*.h.
//
// Taps and channels are added in rising order, each product rounded, as in kernels/rcm/reference.py, so the bits are its.
#pragma once

#include "paths.h"

namespace qengine {
namespace {

// Mirrored at the first and last, which are not repeated.
inline size_t reflected(ptrdiff_t at, size_t size) {
    const ptrdiff_t last = static_cast<ptrdiff_t>(size) - 1;
    if (at < 0) return static_cast<size_t>(-at);
    return static_cast<size_t>(at > last ? 2 * last - at : at);
}

inline void add_tap(float weight, const float* from, float* to, size_t count) {
    for (size_t i = 0; i < count; ++i) to[i] += weight * from[i];
}

inline void clear(float* to, size_t count) {
    for (size_t i = 0; i < count; ++i) to[i] = 0.0f;
}

// One row of one channel, blurred along itself; line has room for width + 2 * radius.
inline void blur_along(const ChangeJob& job, size_t start, float* line, float* to) {
    const size_t width = job.width, radius = job.radius;
    float* inner = line + radius;
    for (size_t i = 0; i < width; ++i) inner[i] = job.x[start + i] - job.control[start + i];
    for (size_t i = 1; i <= radius; ++i) {
        line[radius - i] = inner[i];
        inner[width - 1 + i] = inner[width - 1 - i];
    }
    clear(to, width);
    for (size_t k = 0; k <= 2 * radius; ++k) add_tap(job.weights[k], line + k, to, width);
}

// Add |blur| of one channel to rows [begin, end) of the difference.
inline void add_channel(const ChangeJob& job, size_t channel, size_t begin, size_t end, float* scratch) {
    const size_t width = job.width, taps = 2 * job.radius + 1;
    float* line = scratch;
    float* blurred = line + width + 2 * job.radius;
    float* along = blurred + width;
    for (size_t i = 0; i < end - begin + taps - 1; ++i) {
        const ptrdiff_t wanted = static_cast<ptrdiff_t>(begin + i) - static_cast<ptrdiff_t>(job.radius);
        const size_t row = reflected(wanted, job.height);
        blur_along(job, (channel * job.height + row) * width, line, along + i * width);
    }
    for (size_t row = begin; row < end; ++row) {
        clear(blurred, width);
        for (size_t k = 0; k < taps; ++k) add_tap(job.weights[k], along + (row - begin + k) * width, blurred, width);
        float* to = job.difference + row * width;
        for (size_t i = 0; i < width; ++i) to[i] += blurred[i] < 0.0f ? -blurred[i] : blurred[i];
    }
}

size_t change_scratch(size_t rows, size_t width, size_t radius) { return (rows + 2 * radius + 2) * width + 2 * radius; }

float change(const ChangeJob& job, size_t begin, size_t end, float* scratch) {
    const float channels = static_cast<float>(job.channels);
    float* first = job.difference + begin * job.width;
    const size_t count = (end - begin) * job.width;
    clear(first, count);
    for (size_t channel = 0; channel < job.channels; ++channel) add_channel(job, channel, begin, end, scratch);
    float most = 0.0f;
    for (size_t i = 0; i < count; ++i) {
        first[i] /= channels;
        most = first[i] > most ? first[i] : most;
    }
    return most;
}

}  // namespace
}  // namespace qengine
