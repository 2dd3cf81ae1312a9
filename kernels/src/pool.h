// Pieces of work taken in turn by a bounded number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace qengine {

// Call work(piece, worker) once for every piece below `pieces`; worker is below `threads`. work must not throw.
template <class Work>
void share(size_t pieces, uint32_t threads, const Work& work) {
    if (pieces == 0) return;
    std::atomic<size_t> next{0};
    const auto run = [&](size_t worker) {
        for (size_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) work(piece, worker);
    };
    std::vector<std::thread> pool;
    const size_t helpers = std::min<size_t>(threads, pieces) - 1;
    pool.reserve(helpers);
    for (size_t i = 0; i < helpers; ++i) {
        try {
            pool.emplace_back(run, i + 1);
        } catch (const std::system_error&) {
            break;  // fewer threads do the same work
        }
    }
    run(0);
    for (std::thread& thread : pool) thread.join();
}

// Floats for every worker, each part aligned to 64 bytes.
class Scratch {
  public:
    Scratch(size_t floats, size_t workers) : step_((floats + 15) / 16 * 16), room_(step_ * workers + 16) {
        const size_t past = reinterpret_cast<uintptr_t>(room_.data()) / sizeof(float) % 16;
        first_ = room_.data() + (16 - past) % 16;
    }

    float* of(size_t worker) { return first_ + worker * step_; }

  private:
    size_t step_;
    std::vector<float> room_;
    float* first_;
};

}  // namespace qengine
