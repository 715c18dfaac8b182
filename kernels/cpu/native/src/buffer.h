// Memory that grows and is used again.
#pragma once
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace quire {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // At least so many bytes on a 64-byte boundary, contents arbitrary; null if there is no memory.
  char* get(i64 bytes) {
    if (bytes > size_) {
      std::free(data_);
      const i64 page = bytes >= kHugePage / 2 ? kHugePage : 4096;
      size_ = (bytes + page - 1) / page * page;
      data_ = (char*)std::aligned_alloc(page, size_);
      if (!data_) size_ = 0;
#if defined(__linux__)
      if (data_ && page == kHugePage) madvise(data_, size_, MADV_HUGEPAGE);
#endif
    }
    return data_;
  }

 private:
  static constexpr i64 kHugePage = 1 << 21;
  char* data_ = nullptr;
  i64 size_ = 0;
};

}  // namespace quire
