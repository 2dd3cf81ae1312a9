// Every entry point of the native library over buffers of exactly the bytes that it may touch: odd sizes, strides, every
// instruction set, several threads, and arguments that it must refuse. Built with sanitisers; prints one line.

#include "qengine.h"

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <vector>

namespace {

int calls = 0;

void expect(int got, int wanted, const char* what) {
    ++calls;
    if (got == wanted) return;
    std::fprintf(stderr, "%s must give %d, got %d\n", what, wanted, got);
    std::exit(1);
}

void same(const std::vector<unsigned char>& a, const std::vector<unsigned char>& b, const char* what) {
    if (a == b) return;
    std::fprintf(stderr, "%s must give the same bytes on every instruction set\n", what);
    std::exit(1);
}

size_t bytes_of(uint32_t dtype) { return dtype == QENGINE_FLOAT32 ? 4 : 2; }

// A matrix whose last row ends where its memory does, and starts one element behind the start of it.
struct Matrix {
    std::unique_ptr<unsigned char[]> memory;
    qengine_matrix view;

    Matrix(uint64_t rows, uint64_t columns, uint64_t stride, uint32_t dtype) {
        const size_t size = bytes_of(dtype), count = (rows - 1) * stride + columns;
        memory.reset(new unsigned char[(count + 1) * size]);
        for (size_t i = 0; i <= count; ++i) write(memory.get() + i * size, dtype, i);
        view = {memory.get() + size, rows, columns, stride, dtype};
    }

    static void write(unsigned char* to, uint32_t dtype, size_t i) {
        const float value = std::sin(static_cast<float>(i) * 1.7f) * (i % 97 == 5 ? 40.0f : 1.0f);
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        const uint16_t half = static_cast<uint16_t>(dtype == QENGINE_BFLOAT16 ? bits >> 16 : 0x3000u + i % 0x0C00u);
        std::memcpy(to, dtype == QENGINE_FLOAT32 ? static_cast<const void*>(&bits) : &half, bytes_of(dtype));
    }
};

std::vector<uint32_t> paths() {
    std::vector<uint32_t> found;
    for (const uint32_t isa : {QENGINE_ISA_BEST, QENGINE_ISA_PLAIN, QENGINE_ISA_AVX2, QENGINE_ISA_AVX512}) {
        if (qengine_isa(isa)) found.push_back(isa);
    }
    return found;
}

void quantise_one(const Matrix& x, uint32_t stored_format, uint32_t group, uint32_t scale_dtype) {
    std::vector<unsigned char> first;
    for (const uint32_t isa : paths()) {
        for (const uint32_t threads : {1u, 3u}) {
            std::vector<unsigned char> stored(x.view.rows * x.view.columns);
            std::vector<unsigned char> scale(x.view.rows * bytes_of(scale_dtype));
            expect(qengine_quantise(&x.view, stored_format, group, scale_dtype, stored.data(), scale.data(), threads, isa),
                   0, "quantise");
            stored.insert(stored.end(), scale.begin(), scale.end());
            if (first.empty()) first = stored;
            same(first, stored, "quantise");
        }
    }
}

void quantise() {
    for (const uint32_t dtype : {QENGINE_FLOAT32, QENGINE_BFLOAT16, QENGINE_FLOAT16}) {
        for (const uint64_t columns : {1u, 15u, 16u, 33u, 64u, 192u, 256u, 768u, 1024u, 1280u}) {
            for (const uint64_t extra : {0u, 3u}) {
                const Matrix x(5, columns, columns + extra, dtype);
                for (const uint32_t group : {1u, 4u, 16u, 64u, 256u}) {
                    if (columns % group == 0) quantise_one(x, QENGINE_INT8, group, QENGINE_FLOAT32);
                }
                quantise_one(x, QENGINE_E4M3, 1, QENGINE_BFLOAT16);
            }
        }
        quantise_one(Matrix(300, 16400, 16400, dtype), QENGINE_INT8, 16, QENGINE_FLOAT32);
        quantise_one(Matrix(300, 15001, 15001, dtype), QENGINE_E4M3, 1, QENGINE_FLOAT32);
    }
}

void columns() {
    for (const uint32_t dtype : {QENGINE_FLOAT32, QENGINE_BFLOAT16, QENGINE_FLOAT16}) {
        for (const uint64_t width : {1u, 7u, 129u, 1031u}) {
            const Matrix x(9, width, width + 1, dtype);
            std::vector<double> mean(width), deviation(width), terms(width, 0.5);
            std::vector<float> target(9 * width), factor(width, 0.25f);
            std::vector<unsigned char> masked(9 * width * bytes_of(dtype));
            const qengine_affine affine = {mean.data(),  terms.data(), terms.data(),
                                           terms.data(), terms.data(), std::numeric_limits<double>::infinity()};
            for (const uint32_t isa : paths()) {
                expect(qengine_column_stats(&x.view, mean.data(), deviation.data(), 3, isa), 0, "column_stats");
                expect(qengine_affine_columns(&x.view, &affine, target.data(), 3, isa), 0, "affine_columns");
                expect(qengine_scale_columns(&x.view, factor.data(), masked.data(), 3, isa), 0, "scale_columns");
            }
        }
    }
}

void change() {
    for (const uint64_t side : {2u, 6u, 38u}) {
        const uint64_t shape[3] = {3, side, side + 2};
        const size_t count = 3 * side * (side + 2);
        std::vector<float> x(count, 0.5f), control(count, 0.25f), target(side / 2 * (side / 2 + 1));
        for (const uint64_t radius : {uint64_t{0}, uint64_t{1}, side - 1}) {
            const std::vector<float> weights(2 * radius + 1, 1.0f / static_cast<float>(2 * radius + 1));
            for (const uint32_t isa : paths()) {
                for (const uint64_t reach : {uint64_t{0}, uint64_t{2}, std::numeric_limits<uint64_t>::max()}) {
                    expect(qengine_change_mask(x.data(), control.data(), shape, weights.data(), radius, 0.5f, 1, reach,
                                               target.data(), 4, isa),
                           0, "change_mask");
                }
            }
        }
    }
}

void refused_quantise() {
    float value = 1.0f, scale = 0.0f;
    unsigned char stored = 7;
    const qengine_matrix good = {&value, 1, 1, 1, QENGINE_FLOAT32};
    const auto call = [&](qengine_matrix x, uint32_t stored_format, uint32_t group, uint32_t scales, uint32_t threads) {
        return qengine_quantise(&x, stored_format, group, scales, &stored, &scale, threads, QENGINE_ISA_BEST);
    };
    const uint64_t huge = std::numeric_limits<uint64_t>::max() / 2;
    const char* at = reinterpret_cast<const char*>(&value);
    expect(qengine_quantise(nullptr, 0, 1, 0, &stored, &scale, 1, 0), EINVAL, "no matrix");
    expect(qengine_quantise(&good, 0, 1, 0, nullptr, &scale, 1, 0), EINVAL, "nowhere to store");
    expect(qengine_quantise(&good, 0, 1, 0, &stored, nullptr, 1, 0), EINVAL, "nowhere for scales");
    expect(qengine_quantise(&good, 0, 1, 0, &stored, &scale, 1, 9), EINVAL, "no such isa");
    expect(call({nullptr, 1, 1, 1, 0}, 0, 1, 0, 1), EINVAL, "no data");
    expect(call({at + 1, 1, 1, 1, 0}, 0, 1, 0, 1), EINVAL, "unaligned data");
    expect(call({at, 1, 0, 0, 0}, 0, 1, 0, 1), EINVAL, "no columns");
    expect(call({at, 2, 2, 1, 0}, 0, 1, 0, 1), EINVAL, "rows that overlap");
    expect(call({at, huge, huge, huge, 0}, 0, 1, 0, 1), EINVAL, "too many values");
    expect(call({at, 1, 1, 1, 3}, 0, 1, 0, 1), EINVAL, "no such dtype");
    expect(call(good, 2, 1, 0, 1), EINVAL, "no such format");
    expect(call(good, 0, 4, 0, 1), EINVAL, "a group that does not divide");
    expect(call(good, 0, 0, 0, 1), EINVAL, "a group of none");
    expect(call(good, 1, 4, 0, 1), EINVAL, "a rotation of fp8");
    expect(call(good, 0, 1, 2, 1), EINVAL, "float16 scales");
    expect(call(good, 0, 1, 0, 0), EINVAL, "no threads");
    expect(call(good, 0, 1, 0, 65), EINVAL, "65 threads");
    expect(stored, 7, "what was refused");
    expect(call({nullptr, 0, 1, 1, 0}, 0, 1, 0, 1), 0, "no rows");
}

void refused_columns() {
    float value = 1.0f, out = 7.0f;
    double number = 1.0;
    const qengine_matrix x = {&value, 1, 1, 1, QENGINE_FLOAT32}, none = {&value, 0, 1, 1, QENGINE_FLOAT32};
    const qengine_affine good = {&number, &number, &number, &number, &number, 1.0};
    qengine_affine unlimited = good, missing = good;
    unlimited.limit = 0.0;
    missing.gain = nullptr;
    expect(qengine_column_stats(&none, &number, &number, 1, 0), EINVAL, "no rows");
    expect(qengine_column_stats(&x, nullptr, &number, 1, 0), EINVAL, "nowhere for means");
    expect(qengine_column_stats(&x, &number, nullptr, 1, 0), EINVAL, "nowhere for deviations");
    expect(qengine_affine_columns(&x, nullptr, &out, 1, 0), EINVAL, "no terms");
    expect(qengine_affine_columns(&x, &missing, &out, 1, 0), EINVAL, "no gain");
    expect(qengine_affine_columns(&x, &unlimited, &out, 1, 0), EINVAL, "a limit of 0");
    expect(qengine_affine_columns(&x, &good, nullptr, 1, 0), EINVAL, "nowhere to write");
    expect(qengine_affine_columns(&x, &good, &out, 0, 0), EINVAL, "no threads");
    expect(qengine_scale_columns(&x, nullptr, &out, 1, 0), EINVAL, "no factors");
    expect(qengine_scale_columns(&x, &value, nullptr, 1, 0), EINVAL, "nowhere to write");
    expect(out == 7.0f, 1, "what was refused");
}

void refused_change() {
    const std::vector<float> x(8, 1.0f), weights(9, 1.0f);
    std::vector<float> out(2, 7.0f);
    const auto call = [&](const uint64_t* shape, uint64_t radius, float threshold, uint32_t relative, uint32_t threads) {
        return qengine_change_mask(x.data(), x.data(), shape, weights.data(), radius, threshold, relative, 0, out.data(),
                                   threads, 0);
    };
    const uint64_t good[3] = {1, 2, 4}, odd[3] = {1, 1, 4}, none[3] = {0, 2, 4}, wide[3] = {1, 2, uint64_t{1} << 40};
    expect(call(nullptr, 0, 0.5f, 0, 1), EINVAL, "no shape");
    expect(call(odd, 0, 0.5f, 0, 1), EINVAL, "an odd height");
    expect(call(none, 0, 0.5f, 0, 1), EINVAL, "no channels");
    expect(call(wide, 0, 0.5f, 0, 1), EINVAL, "too wide");
    expect(call(good, 2, 0.5f, 0, 1), EINVAL, "a radius as large as the height");
    expect(call(good, 0, std::nanf(""), 0, 1), EINVAL, "a threshold that is NaN");
    expect(call(good, 0, 0.5f, 2, 1), EINVAL, "relative 2");
    expect(call(good, 0, 0.5f, 0, 0), EINVAL, "no threads");
    expect(out[0] == 7.0f, 1, "what was refused");
    expect(call(good, 1, 0.5f, 1, 64), 0, "change_mask");
}

void read(const char* path) {
    std::FILE* file = std::fopen(path, "wb");
    if (!file) std::exit(2);
    std::vector<unsigned char> written(1001);
    for (size_t i = 0; i < written.size(); ++i) written[i] = static_cast<unsigned char>(i * 7);
    std::fwrite(written.data(), 1, written.size(), file);
    std::fclose(file);
    std::vector<unsigned char> whole(1001), part(10);
    const qengine_range ranges[2] = {{0, 1001, whole.data()}, {991, 10, part.data()}};
    const qengine_range past[1] = {{995, 10, part.data()}}, nowhere[1] = {{0, 1, nullptr}};
    uint64_t stopped = 0;
    expect(qengine_read(path, ranges, 2, 3, 64, &stopped), 0, "read");
    expect(whole == written && std::memcmp(part.data(), &written[991], 10) == 0, 1, "bytes read");
    expect(qengine_read(path, past, 1, 3, 64, &stopped), -1, "a read past the end");
    expect(static_cast<int>(stopped), 1001, "where it stopped");
    expect(qengine_read(path, nowhere, 1, 1, 64, &stopped), EINVAL, "a read to nowhere");
    expect(qengine_read(nullptr, ranges, 2, 1, 64, &stopped), EINVAL, "a read of nothing");
    expect(qengine_read("/nonexistent", ranges, 2, 1, 64, &stopped), ENOENT, "a read of no file");
}

}  // namespace

int main(int count, char** words) {
    if (count != 2) return 2;
    quantise();
    columns();
    change();
    refused_quantise();
    refused_columns();
    refused_change();
    read(words[1]);
    std::printf("%d calls, ABI %u\n", calls, qengine_abi_version());
    return 0;
}
