// The change mask of two latents on the token grid; formulas in kernels/rcm. A row of differences does not depend on the
// piece it is worked on in, so any number of threads gives the same bits.

#include <algorithm>
#include <cerrno>
#include <new>
#include <vector>

#include "checks.h"
#include "pool.h"

namespace {

using namespace qengine;

constexpr size_t kPieceRows = 16;
constexpr size_t kMost = 1 << 24;  // of any side, so that no product of two overflows

bool valid_shape(const uint64_t shape[3], uint64_t radius) {
    for (int i = 0; i < 3; ++i) {
        if (shape[i] < 1 || shape[i] > kMost) return false;
    }
    if (shape[1] % 2 || shape[2] % 2 || !countable(shape[0] * shape[1], shape[2])) return false;
    return radius < shape[1] && radius < shape[2];
}

// 2x2 means of (difference >= threshold): quarters, exact in float32.
std::vector<float> token_means(const ChangeJob& job, float threshold) {
    const size_t width = job.width / 2, height = job.height / 2;
    std::vector<float> means(height * width);
    for (size_t row = 0; row < height; ++row) {
        const float* upper = job.difference + 2 * row * job.width;
        const float* lower = upper + job.width;
        for (size_t i = 0; i < width; ++i) {
            const int count = (upper[2 * i] >= threshold) + (upper[2 * i + 1] >= threshold) +
                              (lower[2 * i] >= threshold) + (lower[2 * i + 1] >= threshold);
            means[row * width + i] = 0.25f * static_cast<float>(count);
        }
    }
    return means;
}

// The largest of the values at most `reach` away along one axis: `count` values, `step` apart.
void widen_along(const float* from, size_t count, size_t step, size_t reach, float* to) {
    for (size_t i = 0; i < count; ++i) {
        const size_t first = i > reach ? i - reach : 0, last = std::min(count - 1, i + reach);
        float most = from[first * step];
        for (size_t k = first + 1; k <= last; ++k) most = std::max(most, from[k * step]);
        to[i * step] = most;
    }
}

void dilate(std::vector<float>& means, size_t height, size_t width, size_t reach, float* target) {
    if (reach == 0) {
        std::copy(means.begin(), means.end(), target);
        return;
    }
    std::vector<float> along(means.size());
    const size_t far = std::min(reach, std::max(height, width));
    for (size_t row = 0; row < height; ++row) widen_along(&means[row * width], width, 1, far, &along[row * width]);
    for (size_t column = 0; column < width; ++column) widen_along(&along[column], height, width, far, target + column);
}

int run(ChangeJob& job, const Kernels& kernels, float threshold, bool relative, size_t reach, float* target,
        uint32_t threads) {
    std::vector<float> difference(job.height * job.width);
    job.difference = difference.data();
    const size_t step = std::min(kPieceRows, job.height);
    const size_t pieces = (job.height + step - 1) / step;
    threads = static_cast<uint32_t>(std::min<size_t>(threads, pieces));
    Scratch scratch(kernels.change_scratch(step, job.width, job.radius), threads);
    std::vector<float> most(pieces);
    share(pieces, threads, [&](size_t piece, size_t worker) {
        most[piece] = kernels.change(job, piece * step, std::min(job.height, (piece + 1) * step), scratch.of(worker));
    });
    if (relative) threshold *= *std::max_element(most.begin(), most.end());
    std::vector<float> means = token_means(job, threshold);
    dilate(means, job.height / 2, job.width / 2, reach, target);
    return 0;
}

}  // namespace

extern "C" QENGINE_API int qengine_change_mask(const float* x, const float* control, const uint64_t shape[3],
                                               const float* weights, uint64_t radius, float threshold,
                                               uint32_t relative, uint64_t dilate_size, float* target,
                                               uint32_t threads, uint32_t isa) {
    if (!x || !control || !shape || !weights || !target || !valid_shape(shape, radius)) return EINVAL;
    if (relative > 1 || !(threshold == threshold) || !valid_threads(threads) || !valid_isa(isa)) return EINVAL;
    for (const void* pointer : {static_cast<const void*>(x), static_cast<const void*>(control),
                                static_cast<const void*>(weights), static_cast<const void*>(target)}) {
        if (!aligned(pointer, sizeof(float))) return EINVAL;
    }
    const Kernels* kernels = kernels_of(isa);
    if (!kernels) return ENOTSUP;
    ChangeJob job = {x, control, shape[0], shape[1], shape[2], weights, radius, nullptr};
    try {
        return run(job, *kernels, threshold, relative != 0, dilate_size, target, threads);
    } catch (const std::bad_alloc&) {
        return ENOMEM;
    }
}
