// Sleeping on a word of shared memory until another process changes it.
#pragma once
#include <atomic>
#include <cstdint>

#include "base/clock.h"

namespace nixl::core {

static_assert(std::atomic<std::uint32_t>::is_always_lock_free && std::atomic<std::uint64_t>::is_always_lock_free);

// Returns when the word is woken, differs from `seen`, the deadline passes, or for no reason: look again.
void futex_wait(const std::atomic<std::uint32_t>& word, std::uint32_t seen, Deadline deadline) noexcept;
void futex_wake_all(std::atomic<std::uint32_t>& word) noexcept;

// A word that others ring and one thread waits on. Lies in shared memory; all zero is its initial state.
//   seen = bell.rings_heard(); look at what the ringers change; bell.sleep(seen, deadline); look again
struct Doorbell {
  std::atomic<std::uint32_t> rings{0};
  std::atomic<std::uint32_t> sleeping{0};

  void ring() noexcept {
    rings.fetch_add(1, std::memory_order_seq_cst);
    if (sleeping.load(std::memory_order_seq_cst)) futex_wake_all(rings);
  }
  std::uint32_t rings_heard() const noexcept { return rings.load(std::memory_order_seq_cst); }
  // Returns at once if it rang since `seen`.
  void sleep(std::uint32_t seen, Deadline deadline) noexcept {
    sleeping.store(1, std::memory_order_seq_cst);
    if (rings_heard() == seen) futex_wait(rings, seen, deadline);
    sleeping.store(0, std::memory_order_relaxed);
  }
};

int usable_cores() noexcept;  // that this process may run on

}  // namespace nixl::core
