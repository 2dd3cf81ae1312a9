#include "paths.h"

#if defined(QENGINE_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace {

#ifdef QENGINE_X86
#ifdef _MSC_VER

struct Features {
    bool avx2 = false;
    bool avx512 = false;

    Features() {
        int leaf1[4], leaf7[4];
        __cpuid(leaf1, 0);
        if (leaf1[0] < 7) return;
        __cpuid(leaf1, 1);
        __cpuidex(leaf7, 7, 0);
        const auto bit = [](int word, int index) { return ((word >> index) & 1) != 0; };
        for (const int index : {27, 28, 29}) {  // OSXSAVE, AVX, F16C
            if (!bit(leaf1[2], index)) return;
        }
        const unsigned long long saved = _xgetbv(0);
        avx2 = (saved & 0x06) == 0x06 && bit(leaf7[1], 5);
        avx512 = avx2 && (saved & 0xE6) == 0xE6 && bit(leaf7[1], 16) && bit(leaf7[1], 17) && bit(leaf7[1], 28) &&
                 bit(leaf7[1], 30) && bit(leaf7[1], 31);  // F, DQ, CD, BW, VL
    }
};

#else

struct Features {
    bool avx2 = false;
    bool avx512 = false;

    Features() {
        __builtin_cpu_init();
        avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
        avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
    }
};

#endif
#else

struct Features {
    bool avx2 = false;
    bool avx512 = false;
};

#endif

uint32_t resolve(uint32_t isa) {
    static const Features features;
    switch (isa) {
        case QENGINE_ISA_BEST:
            return features.avx512 ? QENGINE_ISA_AVX512 : features.avx2 ? QENGINE_ISA_AVX2 : QENGINE_ISA_PLAIN;
        case QENGINE_ISA_PLAIN:
            return QENGINE_ISA_PLAIN;
        case QENGINE_ISA_AVX2:
            return features.avx2 ? isa : 0;
        case QENGINE_ISA_AVX512:
            return features.avx512 ? isa : 0;
        default:
            return 0;
    }
}

}  // namespace

namespace qengine {

const Kernels* kernels_of(uint32_t isa) {
    switch (resolve(isa)) {
        case QENGINE_ISA_PLAIN:
            return &kPlainKernels;
#ifdef QENGINE_X86
        case QENGINE_ISA_AVX2:
            return &kAvx2Kernels;
        case QENGINE_ISA_AVX512:
            return &kAvx512Kernels;
#endif
        default:
            return nullptr;
    }
}

}  // namespace qengine

extern "C" QENGINE_API uint32_t qengine_isa(uint32_t isa) { return resolve(isa); }
