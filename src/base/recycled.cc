#include "base/recycled.h"

#include <array>
#include <bit>
#include <mutex>

namespace nixl::core {
namespace {

constexpr std::size_t kSmallest = 64 << 10;  // below, malloc keeps what is freed by itself
constexpr std::size_t kLargest = 16 << 20;
constexpr int kSmallestBits = std::countr_zero(kSmallest);
constexpr int kClasses = std::countr_zero(kLargest) - kSmallestBits + 1;

// Freed blocks by size, a power of two each; chained through their first word.
struct Kept {
  std::mutex mutex;
  std::array<void*, kClasses> first{};
  std::size_t bytes = 0;
};
Kept& kept() {
  static Kept* const all = new Kept;  // arrays may be freed at exit
  return *all;
}

bool is_kept_size(std::size_t bytes) {
  return bytes >= kSmallest && bytes <= kLargest;
}

int class_of(std::size_t bytes) {
  return std::countr_zero(std::bit_ceil(bytes)) - kSmallestBits;
}

}  // namespace

void* take_block(std::size_t bytes) {
  if (!is_kept_size(bytes)) return ::operator new(bytes);
  const int index = class_of(bytes);
  Kept& all = kept();
  {
    const std::lock_guard lock(all.mutex);
    if (void* const block = all.first[index]) {
      all.first[index] = *static_cast<void**>(block);
      all.bytes -= kSmallest << index;
      return block;
    }
  }
  return ::operator new(kSmallest << index);
}

void return_block(void* block, std::size_t bytes) noexcept {
  if (block && is_kept_size(bytes)) {
    const int index = class_of(bytes);
    Kept& all = kept();
    const std::lock_guard lock(all.mutex);
    if (all.bytes + (kSmallest << index) <= kMostKept) {
      *static_cast<void**>(block) = all.first[index];
      all.first[index] = block;
      all.bytes += kSmallest << index;
      return;
    }
  }
  ::operator delete(block);
}

}  // namespace nixl::core
