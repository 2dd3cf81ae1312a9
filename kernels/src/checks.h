// Argument checks shared by the entry points.
#pragma once

#include <cstdint>
#include <limits>

#include "paths.h"

namespace qengine {

inline size_t bytes_of(uint32_t dtype) { return dtype == QENGINE_FLOAT32 ? 4 : 2; }

inline bool valid_isa(uint32_t isa) { return isa <= QENGINE_ISA_AVX512; }

inline bool valid_threads(uint32_t threads) { return threads >= 1 && threads <= kMaxThreads; }

inline bool aligned(const void* pointer, size_t nbytes) { return reinterpret_cast<uintptr_t>(pointer) % nbytes == 0; }

// The product stays far enough below the address space to be counted in bytes.
inline bool countable(uint64_t a, uint64_t b) {
    constexpr uint64_t limit = std::numeric_limits<int64_t>::max() / 16;
    return b == 0 || a <= limit / b;
}

inline bool valid_matrix(const qengine_matrix* x) {
    if (!x || x->dtype > QENGINE_FLOAT16 || x->columns == 0) return false;
    if (x->row_stride != 0 && x->row_stride < x->columns) return false;
    if (!countable(x->rows, x->columns) || !countable(x->rows, x->row_stride)) return false;
    return x->rows == 0 || (x->data && aligned(x->data, bytes_of(x->dtype)));
}

}  // namespace qengine
