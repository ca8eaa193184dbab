// Memory for large arrays that come and go with requests. A fresh array of a megabyte costs a page fault for every 4
// KiB, several times what filling it costs; so some of what was freed is kept for the next one. Thread-safe.
#pragma once
#include <cstddef>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace nixl::core {

// At least `bytes`, aligned as operator new does. Throws std::bad_alloc.
void* take_block(std::size_t bytes);
// `bytes` as asked for; keeps at most kMostKept of all blocks together, the rest goes back to the system.
void return_block(void* block, std::size_t bytes) noexcept;
inline constexpr std::size_t kMostKept = 32 << 20;

// For trivial T. resize() leaves new elements uninitialised: they are written right after.
template <typename T>
struct Recycled {
  using value_type = T;
  using is_always_equal = std::true_type;
  static_assert(std::is_trivially_copyable_v<T> && alignof(T) <= __STDCPP_DEFAULT_NEW_ALIGNMENT__);

  Recycled() = default;
  template <typename U>
  Recycled(const Recycled<U>&) noexcept {}
  T* allocate(std::size_t count) {
    if (count > static_cast<std::size_t>(-1) / sizeof(T)) throw std::bad_array_new_length();
    return static_cast<T*>(take_block(count * sizeof(T)));
  }
  void deallocate(T* at, std::size_t count) noexcept { return_block(at, count * sizeof(T)); }
  template <typename U>
  void construct(U* at) noexcept {
    ::new (static_cast<void*>(at)) U;
  }
  template <typename U, typename... Args>
  void construct(U* at, Args&&... args) {
    ::new (static_cast<void*>(at)) U(std::forward<Args>(args)...);
  }
  bool operator==(const Recycled&) const noexcept { return true; }
};

template <typename T>
using RecycledVector = std::vector<T, Recycled<T>>;

}  // namespace nixl::core
