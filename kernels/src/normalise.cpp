// Statistics and maps of columns. A column's sums are taken by one thread, row after row, so any number of threads gives
// the same bits.

#include <algorithm>
#include <cerrno>
#include <new>

#include "checks.h"
#include "pool.h"

namespace {

using namespace qengine;

constexpr size_t kStatColumns = 128;
constexpr size_t kPieceElements = 1 << 16;
constexpr size_t kDoubles = alignof(double);

bool valid_call(const qengine_matrix* x, uint32_t threads, uint32_t isa) {
    return valid_matrix(x) && x->rows > 0 && valid_threads(threads) && valid_isa(isa);
}

bool valid_doubles(const double* values) { return values && aligned(values, kDoubles); }

bool valid_terms(const qengine_affine* terms) {
    return terms && valid_doubles(terms->shift) && valid_doubles(terms->scale) && valid_doubles(terms->gain) &&
           valid_doubles(terms->offset) && valid_doubles(terms->linear) && terms->limit > 0;
}

template <class Work>
int by_pieces(size_t total, size_t step, uint32_t threads, const Work& work) {
    try {
        share((total + step - 1) / step, threads,
              [&](size_t piece, size_t) { work(piece * step, std::min(total, (piece + 1) * step)); });
        return 0;
    } catch (const std::bad_alloc&) {
        return ENOMEM;
    }
}

size_t rows_per_piece(const qengine_matrix& x) { return std::max<size_t>(1, kPieceElements / x.columns); }

}  // namespace

extern "C" QENGINE_API int qengine_column_stats(const qengine_matrix* x, double* mean, double* deviation,
                                                uint32_t threads, uint32_t isa) {
    if (!valid_call(x, threads, isa) || !valid_doubles(mean) || !valid_doubles(deviation)) return EINVAL;
    const Kernels* kernels = kernels_of(isa);
    if (!kernels) return ENOTSUP;
    return by_pieces(x->columns, kStatColumns, threads, [&](size_t begin, size_t end) {
        kernels->column_stats(*x, begin, end, mean, deviation);
    });
}

extern "C" QENGINE_API int qengine_affine_columns(const qengine_matrix* x, const qengine_affine* terms, float* target,
                                                  uint32_t threads, uint32_t isa) {
    if (!valid_call(x, threads, isa) || !valid_terms(terms) || !target || !aligned(target, sizeof(float))) return EINVAL;
    const Kernels* kernels = kernels_of(isa);
    if (!kernels) return ENOTSUP;
    return by_pieces(x->rows, rows_per_piece(*x), threads,
                     [&](size_t begin, size_t end) { kernels->affine(*x, *terms, begin, end, target); });
}

extern "C" QENGINE_API int qengine_scale_columns(const qengine_matrix* x, const float* factor, void* target,
                                                 uint32_t threads, uint32_t isa) {
    if (!valid_call(x, threads, isa) || !factor || !aligned(factor, sizeof(float))) return EINVAL;
    if (!target || !aligned(target, bytes_of(x->dtype))) return EINVAL;
    const Kernels* kernels = kernels_of(isa);
    if (!kernels) return ENOTSUP;
    return by_pieces(x->rows, rows_per_piece(*x), threads,
                     [&](size_t begin, size_t end) { kernels->scale(*x, factor, begin, end, target); });
}
