// The event descriptors on which the callers of a peer's agent sleep. A sender writes to them itself, which saves the peer a
// wake-up of its progress thread and a hand-over from there.
#pragma once
#include <array>
#include <cstdint>

#include "backends/samehost/peer.h"
#include "base/fd.h"

namespace nixl::core::samehost {

// What a segment says of an eventfd of this process: its number and the kernel's id of it. 0: it cannot be told.
std::uint64_t callers_event_word(int eventfd) noexcept;

// A sender's copies of them. Not thread-safe.
class CallersEvents {
 public:
  // Writes to all of them if the callers may sleep. Call after something was put into a lane of the peer; false: not all were
  // told, ring the doorbell.
  bool signal(PeerProcess& peer) noexcept;

 private:
  struct Copy {
    std::uint64_t word = 0;
    Fd fd;  // none: it could not be fetched
  };
  std::array<Copy, kMaxCallersEvents> copies_;
};

}  // namespace nixl::core::samehost
