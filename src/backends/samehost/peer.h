// Another process of this host as this backend sees it: proof of who it is, whether it lives, and copies into its
// memory.
#pragma once
#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "backends/samehost/segment.h"
#include "base/clock.h"
#include "base/fd.h"
#include "base/result.h"
#include "contract/plan.h"

namespace nixl::core::samehost {

// What an agent tells its peers about itself; the bytes of export_connection.
struct Address {
  std::string host;  // boot id and namespaces: equal on both sides means "this host"
  std::uint32_t pid = 0;
  std::uint32_t segment_fd = 0;      // in that process
  std::uint64_t header_address = 0;  // of the segment header in that process
  std::uint64_t incarnation = 0;
  std::string doorbell;  // abstract datagram socket; one byte wakes the owner

  std::string encode() const;
  static Result<Address> decode(std::string_view bytes);
};

// Identity of this host and of the namespaces in which pids and sockets mean the same. kUnsupported without /proc.
Result<std::string> host_identity();

// Lets peers copy into and out of this process where Yama's default (ptrace_scope 1) would forbid it.
void allow_peers() noexcept;

class PeerProcess {
 public:
  // kUnsupported: another host, or the kernel forbids the copy (the reason says which rule). kPeerLost: gone or
  // restarted.
  static Result<PeerProcess> open(const Address& address);

  // false once the process has died. Asks the kernel at most every 20 us; `now`: ask in any case.
  bool alive(bool now = false) noexcept;

  // Copies between equally long lists of pieces, all of it or an error. kPeerLost when the process is gone; a pid that was
  // given to another process is never used.
  Result<void> copy(Op op, std::span<iovec> local, std::span<iovec> remote) noexcept;

  Segment& segment() noexcept { return segment_; }
  int pid_fd() const noexcept { return pid_fd_.get(); }
  std::uint32_t pid() const noexcept { return pid_; }

  PeerProcess(PeerProcess&&) noexcept;

 private:
  PeerProcess() = default;
  bool copy_small(Op op, const iovec& local, const iovec& remote) noexcept;
  Result<void> explain(int error, const iovec& local, const iovec& remote) noexcept;

  Fd pid_fd_;
  Fd memory_;  // its /proc/PID/mem, bound to this very process; none where the kernel does not let us open it
  Segment segment_;
  std::uint32_t pid_ = 0;
  std::atomic<Nanoseconds> asked_at_{0};
};

}  // namespace nixl::core::samehost
