// Memory that grows and is used again.
#pragma once
#include <cstdlib>

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
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = (char*)std::aligned_alloc(64, size_);
      if (!data_) size_ = 0;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  i64 size_ = 0;
};

}  // namespace quire
