// Parallel reads of byte ranges of one file into memory given by the caller.
//
// Contract: every byte of every range is read or an error is returned; nothing outside the ranges is written.

#include "qengine.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <fcntl.h>
#include <unistd.h>
#endif

namespace {

constexpr uint32_t kMaxThreads = 64;
constexpr int kShortFile = -1;

#ifdef _WIN32

int to_errno(DWORD error) {
    switch (error) {
        case ERROR_FILE_NOT_FOUND:
        case ERROR_PATH_NOT_FOUND:
            return ENOENT;
        case ERROR_ACCESS_DENIED:
        case ERROR_SHARING_VIOLATION:
            return EACCES;
        default:
            return EIO;
    }
}

class File {
  public:
    int open(const char* path) {
        const int length = MultiByteToWideChar(CP_UTF8, 0, path, -1, nullptr, 0);
        if (length <= 0) return EINVAL;
        std::vector<wchar_t> wide(static_cast<size_t>(length));
        MultiByteToWideChar(CP_UTF8, 0, path, -1, wide.data(), length);
        handle_ = CreateFileW(wide.data(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING,
                              FILE_ATTRIBUTE_NORMAL, nullptr);
        return handle_ == INVALID_HANDLE_VALUE ? to_errno(GetLastError()) : 0;
    }

    // Bytes read, 0 at the end of the file, or minus an errno.
    int64_t read(uint64_t offset, void* target, size_t nbytes) const {
        OVERLAPPED where = {};
        where.Offset = static_cast<DWORD>(offset);
        where.OffsetHigh = static_cast<DWORD>(offset >> 32);
        DWORD done = 0;
        const DWORD wanted = static_cast<DWORD>(std::min<size_t>(nbytes, 1u << 30));
        if (ReadFile(handle_, target, wanted, &done, &where)) return done;
        const DWORD error = GetLastError();
        return error == ERROR_HANDLE_EOF ? 0 : -static_cast<int64_t>(to_errno(error));
    }

    ~File() {
        if (handle_ != INVALID_HANDLE_VALUE) CloseHandle(handle_);
    }

  private:
    HANDLE handle_ = INVALID_HANDLE_VALUE;
};

#else

class File {
  public:
    int open(const char* path) {
        do {
            descriptor_ = ::open(path, O_RDONLY | O_CLOEXEC);
        } while (descriptor_ < 0 && errno == EINTR);
        return descriptor_ < 0 ? errno : 0;
    }

    // Bytes read, 0 at the end of the file, or minus an errno.
    int64_t read(uint64_t offset, void* target, size_t nbytes) const {
        for (;;) {
            const ssize_t done = ::pread(descriptor_, target, nbytes, static_cast<off_t>(offset));
            if (done >= 0) return done;
            if (errno != EINTR) return -static_cast<int64_t>(errno);
        }
    }

    ~File() {
        if (descriptor_ >= 0) ::close(descriptor_);
    }

  private:
    int descriptor_ = -1;
};

#endif

struct Piece {
    uint64_t offset;
    size_t nbytes;
    unsigned char* target;
};

class Reader {
  public:
    Reader(const File& file, std::vector<Piece> pieces) : file_(file), pieces_(std::move(pieces)) {}

    // Take pieces until none is left or one of the threads has failed.
    void work() {
        while (!failed_.load(std::memory_order_relaxed)) {
            const size_t index = next_.fetch_add(1, std::memory_order_relaxed);
            if (index >= pieces_.size()) return;
            read_piece(pieces_[index]);
        }
    }

    int code() const { return code_; }
    uint64_t stopped_at() const { return stopped_at_; }
    size_t count() const { return pieces_.size(); }

  private:
    void read_piece(const Piece& piece) {
        size_t done = 0;
        while (done < piece.nbytes) {
            const int64_t got = file_.read(piece.offset + done, piece.target + done, piece.nbytes - done);
            if (got <= 0) {
                fail(got == 0 ? kShortFile : static_cast<int>(-got), piece.offset + done);
                return;
            }
            done += static_cast<size_t>(got);
        }
    }

    void fail(int code, uint64_t where) {
        const std::lock_guard<std::mutex> guard(lock_);
        if (failed_.exchange(true)) return;
        code_ = code;
        stopped_at_ = where;
    }

    const File& file_;
    const std::vector<Piece> pieces_;
    std::atomic<size_t> next_{0};
    std::atomic<bool> failed_{false};
    std::mutex lock_;
    int code_ = 0;
    uint64_t stopped_at_ = 0;
};

bool valid(const qengine_range& range) {
    constexpr uint64_t limit = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
    return range.offset <= limit && range.nbytes <= limit - range.offset && (range.target || !range.nbytes);
}

void run(Reader& reader, uint32_t threads) {
    std::vector<std::thread> pool;
    const size_t helpers = std::min<size_t>(threads, reader.count()) - 1;
    pool.reserve(helpers);
    for (size_t i = 0; i < helpers; ++i) {
        try {
            pool.emplace_back(&Reader::work, &reader);
        } catch (const std::system_error&) {
            break;  // fewer threads read the same bytes
        }
    }
    reader.work();
    for (std::thread& thread : pool) thread.join();
}

int read_ranges(const char* path, const qengine_range* ranges, size_t count, uint32_t threads, size_t piece_bytes,
                uint64_t* stopped_at) {
    std::vector<Piece> pieces;
    for (size_t i = 0; i < count; ++i) {
        if (!valid(ranges[i])) return EINVAL;
        unsigned char* target = static_cast<unsigned char*>(ranges[i].target);
        for (uint64_t start = 0; start < ranges[i].nbytes; start += piece_bytes) {
            const size_t size = static_cast<size_t>(std::min<uint64_t>(piece_bytes, ranges[i].nbytes - start));
            pieces.push_back({ranges[i].offset + start, size, target + start});
        }
    }
    File file;
    if (const int code = file.open(path)) return code;
    if (pieces.empty()) return 0;
    Reader reader(file, std::move(pieces));
    run(reader, threads);
    *stopped_at = reader.stopped_at();
    return reader.code();
}

}  // namespace

extern "C" QENGINE_API int qengine_read(const char* path, const qengine_range* ranges, size_t count, uint32_t threads,
                                        size_t piece_bytes, uint64_t* stopped_at) {
    if (!path || (!ranges && count) || !stopped_at || threads < 1 || threads > kMaxThreads || piece_bytes < 1) {
        return EINVAL;
    }
    *stopped_at = 0;
    try {
        return read_ranges(path, ranges, count, threads, piece_bytes, stopped_at);
    } catch (const std::bad_alloc&) {
        return ENOMEM;
    }
}
