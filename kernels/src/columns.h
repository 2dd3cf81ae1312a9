// Columns of a matrix in float64: statistics, an affine map with a clamp, factors. Included after one vector_*.h.
#pragma once

#include <cmath>

#include "paths.h"

namespace qengine {
namespace {

constexpr size_t kBlock = 512;

// d = x - first row, so that no digits of a small deviation are lost in a large mean.
template <class T>
void stats_of(const qengine_matrix& x, size_t begin, size_t end, double* mean, double* deviation) {
    const T* data = static_cast<const T*>(x.data);
    const double rows = static_cast<double>(x.rows);
    float values[kBlock];
    double first[kBlock], sum[kBlock], squares[kBlock];
    for (size_t start = begin; start < end; start += kBlock) {
        const size_t count = end - start < kBlock ? end - start : kBlock;
        widen(data + start, values, count);
        for (size_t i = 0; i < count; ++i) {
            first[i] = static_cast<double>(values[i]);
            sum[i] = squares[i] = 0.0;
        }
        for (size_t row = 1; row < x.rows; ++row) {
            widen(data + row * x.row_stride + start, values, count);
            for (size_t i = 0; i < count; ++i) {
                const double d = static_cast<double>(values[i]) - first[i];
                sum[i] += d;
                squares[i] += d * d;
            }
        }
        for (size_t i = 0; i < count; ++i) {
            const double spread = squares[i] - sum[i] * (sum[i] / rows);
            mean[start + i] = first[i] + sum[i] / rows;
            deviation[start + i] = sqrt((spread < 0.0 ? 0.0 : spread) / (rows - 1.0));
        }
    }
}

template <class T>
void affine_of(const qengine_matrix& x, const qengine_affine& terms, size_t begin, size_t end, float* target) {
    const T* data = static_cast<const T*>(x.data);
    const double limit = terms.limit;
    float values[kBlock];
    for (size_t row = begin; row < end; ++row) {
        for (size_t start = 0; start < x.columns; start += kBlock) {
            const size_t count = x.columns - start < kBlock ? x.columns - start : kBlock;
            float* to = target + row * x.columns + start;
            widen(data + row * x.row_stride + start, values, count);
            for (size_t i = 0; i < count; ++i) {
                const size_t j = start + i;
                const double value = static_cast<double>(values[i]);
                double z = (value - terms.shift[j]) * terms.scale[j];
                z = z < -limit ? -limit : z;
                z = z > limit ? limit : z;
                to[i] = static_cast<float>(z * terms.gain[j] + terms.offset[j] + value * terms.linear[j]);
            }
        }
    }
}

template <class T>
void scale_of(const qengine_matrix& x, const float* factor, size_t begin, size_t end, T* target) {
    const T* data = static_cast<const T*>(x.data);
    float values[kBlock];
    for (size_t row = begin; row < end; ++row) {
        for (size_t start = 0; start < x.columns; start += kBlock) {
            const size_t count = x.columns - start < kBlock ? x.columns - start : kBlock;
            T* to = target + row * x.columns + start;
            widen(data + row * x.row_stride + start, values, count);
            for (size_t i = 0; i < count; ++i) {
                const float by = factor[start + i];
                narrow(by == 0.0f ? 0.0f : values[i] * by, to + i);
            }
        }
    }
}

void column_stats(const qengine_matrix& x, size_t begin, size_t end, double* mean, double* deviation) {
    switch (x.dtype) {
        case QENGINE_BFLOAT16:
            return stats_of<Bfloat>(x, begin, end, mean, deviation);
        case QENGINE_FLOAT16:
            return stats_of<Half>(x, begin, end, mean, deviation);
        default:
            return stats_of<float>(x, begin, end, mean, deviation);
    }
}

void affine(const qengine_matrix& x, const qengine_affine& terms, size_t begin, size_t end, float* target) {
    switch (x.dtype) {
        case QENGINE_BFLOAT16:
            return affine_of<Bfloat>(x, terms, begin, end, target);
        case QENGINE_FLOAT16:
            return affine_of<Half>(x, terms, begin, end, target);
        default:
            return affine_of<float>(x, terms, begin, end, target);
    }
}

void scale(const qengine_matrix& x, const float* factor, size_t begin, size_t end, void* target) {
    switch (x.dtype) {
        case QENGINE_BFLOAT16:
            return scale_of<Bfloat>(x, factor, begin, end, static_cast<Bfloat*>(target));
        case QENGINE_FLOAT16:
            return scale_of<Half>(x, factor, begin, end, static_cast<Half*>(target));
        default:
            return scale_of<float>(x, factor, begin, end, static_cast<float*>(target));
    }
}

}  // namespace
}  // namespace qengine
