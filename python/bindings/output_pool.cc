#include "output_pool.h"

#include <sys/mman.h>

#include <new>

namespace {
constexpr std::size_t kMaxFreeBytes = std::size_t{4} << 30;  // of address space; what was never touched costs no memory
constexpr std::size_t kPage = 4096;
std::size_t whole_pages(std::size_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}
}  // namespace

OutputPool& OutputPool::instance() {
  static OutputPool* pool = new OutputPool;  // outlives every tensor, also those freed while the interpreter ends
  return *pool;
}

void* OutputPool::take(std::size_t bytes) {
  bytes = whole_pages(bytes ? bytes : 1);
  {
    std::lock_guard lock(mutex_);
    auto& blocks = free_[bytes];
    if (!blocks.empty()) {
      void* block = blocks.back();
      blocks.pop_back();
      free_bytes_ -= bytes;
      return block;
    }
  }
  void* block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (block == MAP_FAILED) throw std::bad_alloc();
  madvise(block, bytes, MADV_HUGEPAGE);  // rows are written far apart: fewer, larger pages
  return block;
}

void OutputPool::give(void* block, std::size_t bytes) noexcept {
  bytes = whole_pages(bytes ? bytes : 1);
  {
    std::lock_guard lock(mutex_);
    if (free_bytes_ + bytes <= kMaxFreeBytes) {
      free_[bytes].push_back(block);
      free_bytes_ += bytes;
      return;
    }
  }
  munmap(block, bytes);
}
