// Rows of floats to bytes with a scale each. Rows do not see one another, so any number of threads gives the same bits.

#include <algorithm>
#include <cerrno>
#include <new>

#include "checks.h"
#include "pool.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

using namespace qengine;

constexpr size_t kPieceElements = 1 << 17;
constexpr size_t kLargeBytes = 4 << 20;  // more than this is not read again out of a cache

bool valid_group(uint32_t group, uint64_t columns, uint32_t stored_format) {
    if (stored_format == QENGINE_E4M3) return group == 1;
    return (group == 1 || group == 4 || group == 16 || group == 64 || group == 256) && columns % group == 0;
}

bool valid(const qengine_matrix* x, uint32_t stored_format, uint32_t group, uint32_t scale_dtype, const void* stored,
           const void* scale) {
    if (!valid_matrix(x) || stored_format > QENGINE_E4M3 || !valid_group(group, x->columns, stored_format)) return false;
    if (scale_dtype != QENGINE_FLOAT32 && scale_dtype != QENGINE_BFLOAT16) return false;
    return x->rows == 0 || (stored && scale && aligned(scale, bytes_of(scale_dtype)));
}

// Ask for large pages: a new output of many megabytes otherwise costs more to map than to compute. Only advice.
void map_coarsely([[maybe_unused]] void* target, [[maybe_unused]] size_t nbytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t start = reinterpret_cast<uintptr_t>(target);
    const uintptr_t first = (start + page - 1) / page * page, last = (start + nbytes) / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

int run(const QuantiseJob& job, const Kernels& kernels, uint32_t threads) {
    const size_t rows = job.x.rows, columns = job.x.columns;
    const size_t step = std::max<size_t>(1, kPieceElements / columns);
    const size_t pieces = (rows + step - 1) / step;
    threads = static_cast<uint32_t>(std::min<size_t>(threads, pieces));
    Scratch scratch(kernels.quantise_scratch(columns, job.group), threads);
    share(pieces, threads, [&](size_t piece, size_t worker) {
        kernels.quantise(job, piece * step, std::min(rows, (piece + 1) * step), scratch.of(worker));
    });
    return 0;
}

}  // namespace

extern "C" QENGINE_API int qengine_quantise(const qengine_matrix* x, uint32_t stored_format, uint32_t group,
                                            uint32_t scale_dtype, void* stored, void* scale, uint32_t threads,
                                            uint32_t isa) {
    if (!valid(x, stored_format, group, scale_dtype, stored, scale)) return EINVAL;
    if (!valid_threads(threads) || !valid_isa(isa)) return EINVAL;
    const Kernels* kernels = kernels_of(isa);
    if (!kernels) return ENOTSUP;
    const bool large = x->rows * x->columns >= kLargeBytes;
    const bool stream = large && x->columns % 16 == 0 && aligned(stored, 16);
    if (large) map_coarsely(stored, x->rows * x->columns);
    const QuantiseJob job = {*x, stored_format, group, scale_dtype, static_cast<uint8_t*>(stored), scale, stream};
    try {
        return run(job, *kernels, threads);
    } catch (const std::bad_alloc&) {
        return ENOMEM;
    }
}
