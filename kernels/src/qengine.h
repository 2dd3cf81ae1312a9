// The C ABI of the native library. Change QENGINE_ABI_VERSION and kernels/native.py together with any signature.
//
// Every function that returns int returns 0, or an errno value: EINVAL for an argument it does not take (nothing is
// written then), ENOTSUP for an instruction set this CPU has not, ENOMEM. threads is 1 to 64; fewer are used where the
// work is small, and the result does not depend on the number. isa is a QENGINE_ISA; all of them give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define QENGINE_API __declspec(dllexport)
#else
#define QENGINE_API __attribute__((visibility("default")))
#endif

#define QENGINE_ABI_VERSION 2u

extern "C" {

enum qengine_isa_name : uint32_t {
    QENGINE_ISA_BEST = 0,
    QENGINE_ISA_PLAIN = 1,
    QENGINE_ISA_AVX2 = 2,   // with F16C
    QENGINE_ISA_AVX512 = 3  // F, BW, CD, DQ and VL
};

enum qengine_dtype : uint32_t { QENGINE_FLOAT32 = 0, QENGINE_BFLOAT16 = 1, QENGINE_FLOAT16 = 2 };

enum qengine_stored : uint32_t { QENGINE_INT8 = 0, QENGINE_E4M3 = 1 };

struct qengine_range {
    uint64_t offset;  // first byte, from the beginning of the file
    uint64_t nbytes;
    void* target;  // at least nbytes long
};

struct qengine_matrix {
    const void* data;  // aligned to its elements
    uint64_t rows;
    uint64_t columns;
    uint64_t row_stride;  // elements from one row to the next: 0 (one row, repeated), or at least columns
    uint32_t dtype;       // QENGINE_FLOAT32, _BFLOAT16 or _FLOAT16
};

// One value per column; all pointers are columns long.
struct qengine_affine {
    const double* shift;
    const double* scale;
    const double* gain;
    const double* offset;
    const double* linear;
    double limit;  // positive; infinity for none
};

QENGINE_API uint32_t qengine_abi_version(void);

// The instruction set that a call with this isa runs on; 0 where this CPU or this build has it not.
QENGINE_API uint32_t qengine_isa(uint32_t isa);

// Read every range of the file completely. Returns 0; -1 where the file ends inside a range (*stopped_at is the
// file position); or an errno value.
QENGINE_API int qengine_read(const char* path, const qengine_range* ranges, size_t count, uint32_t threads,
                             size_t piece_bytes, uint64_t* stopped_at);

// stored[rows, columns] = round(row / scale), scale[rows] = max|row| / 127 or 448, as kernels/quant/reference.py.
// group is 1, 4, 16, 64 or 256 and divides columns; it must be 1 for QENGINE_E4M3. scale is float32 or bfloat16.
QENGINE_API int qengine_quantise(const qengine_matrix* x, uint32_t stored_format, uint32_t group, uint32_t scale_dtype,
                                 void* stored, void* scale, uint32_t threads, uint32_t isa);

// Mean and unbiased standard deviation of every column, in float64; one pass. The deviation of one row is NaN.
QENGINE_API int qengine_column_stats(const qengine_matrix* x, double* mean, double* deviation, uint32_t threads,
                                     uint32_t isa);

// target[rows, columns] = clamp((x - shift) * scale, -limit, limit) * gain + offset + x * linear, rounded once to float32.
QENGINE_API int qengine_affine_columns(const qengine_matrix* x, const qengine_affine* terms, float* target,
                                       uint32_t threads, uint32_t isa);

// target[rows, columns] = x * factor in float32, rounded to the dtype of x.
QENGINE_API int qengine_scale_columns(const qengine_matrix* x, const float* factor, void* target, uint32_t threads,
                                      uint32_t isa);

// The change mask of two latents [channels, height, width] on the token grid [height / 2, width / 2]; height and width
// are even. weights[2 * radius + 1] is the blur, reflected at the edges; radius is below height and width. dilate_size
// is that of a max-pool of 2 * dilate_size + 1.
QENGINE_API int qengine_change_mask(const float* x, const float* control, const uint64_t shape[3], const float* weights,
                                    uint64_t radius, float threshold, uint32_t relative, uint64_t dilate_size,
                                    float* target, uint32_t threads, uint32_t isa);
}
