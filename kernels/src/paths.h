// What each instruction set provides: one table of functions, compiled from the same headers with other flags.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qengine.h"

namespace qengine {

constexpr uint32_t kMaxThreads = 64;

struct QuantiseJob {
    qengine_matrix x;
    uint32_t stored_format;
    uint32_t group;
    uint32_t scale_dtype;
    uint8_t* stored;
    void* scale;
    bool stream;  // write past the caches
};

struct ChangeJob {
    const float* x;
    const float* control;
    size_t channels;
    size_t height;
    size_t width;
    const float* weights;
    size_t radius;
    float* difference;  // [height, width]
};

struct Kernels {
    // Floats of scratch, aligned to 64 bytes, that quantise needs per thread, and change for so many rows.
    size_t (*quantise_scratch)(size_t columns, uint32_t group);
    size_t (*change_scratch)(size_t rows, size_t width, size_t radius);
    void (*quantise)(const QuantiseJob& job, size_t begin, size_t end, float* scratch);
    void (*column_stats)(const qengine_matrix& x, size_t begin, size_t end, double* mean, double* deviation);
    void (*affine)(const qengine_matrix& x, const qengine_affine& terms, size_t begin, size_t end, float* target);
    void (*scale)(const qengine_matrix& x, const float* factor, size_t begin, size_t end, void* target);
    // Rows of mean over channels |blur(x - control)|; the largest of them.
    float (*change)(const ChangeJob& job, size_t begin, size_t end, float* scratch);
};

extern const Kernels kPlainKernels;
#ifdef QENGINE_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The table of an instruction set, or null where this CPU has it not; isa must be a qengine_isa_name.
const Kernels* kernels_of(uint32_t isa);

}  // namespace qengine
