// The C ABI of the native library. Change QENGINE_ABI_VERSION and kernels/native.py together with any signature.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define QENGINE_API __declspec(dllexport)
#else
#define QENGINE_API __attribute__((visibility("default")))
#endif

#define QENGINE_ABI_VERSION 1u

extern "C" {

struct qengine_range {
    uint64_t offset;  // first byte, from the beginning of the file
    uint64_t nbytes;
    void* target;  // at least nbytes long
};

QENGINE_API uint32_t qengine_abi_version(void);

// Read every range of the file completely. Returns 0; -1 where the file ends inside a range (*stopped_at is the
// file position); or an errno value. threads is 1 to 64.
QENGINE_API int qengine_read(const char* path, const qengine_range* ranges, size_t count, uint32_t threads,
                             size_t piece_bytes, uint64_t* stopped_at);
}
