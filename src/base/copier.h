// Copier: the way between host buffers and memory that the kernel and sockets cannot use in place (a GPU's, or host
// memory misaligned for direct I/O). Functions are called from any threads, several at a time, and block.
#pragma once
#include <sys/uio.h>

#include <cstddef>
#include <span>
#include <string>

#include "base/result.h"

namespace nixl::core {

class Copier {
 public:
  virtual ~Copier() = default;
  // Gathers `memory` into `host`, in order.
  virtual Result<void> to_host(void* host, std::span<const iovec> memory) = 0;
  // Scatters the `bytes` at `host` over the beginning of `memory`.
  virtual Result<void> from_host(std::span<const iovec> memory, const void* host, std::size_t bytes) = 0;
  // Why the last failed copy failed, for those who can pass on no more than that it did.
  virtual std::string last_error() const = 0;
  // A buffer to copy through: aligned to a page, pinned where that makes the copy faster. nullptr: none left.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void free(void* buffer, std::size_t bytes) = 0;
};

}  // namespace nixl::core
