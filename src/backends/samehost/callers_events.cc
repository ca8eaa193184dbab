#include "backends/samehost/callers_events.h"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace nixl::core::samehost {
namespace {

Fd fetch(PeerProcess& peer, std::uint64_t word) noexcept {
  Fd copy(static_cast<int>(::syscall(SYS_pidfd_getfd, peer.pid_fd(), static_cast<int>(word >> 32), 0)));
  // The number may have gone to another file of the owner's since: only the eventfd that was named is written to.
  if (copy && callers_event_word(copy.get()) << 32 != word << 32) copy.reset();
  return copy;
}

}  // namespace

std::uint64_t callers_event_word(int eventfd) noexcept {
  std::array<char, 64> path;
  std::snprintf(path.data(), path.size(), "/proc/self/fdinfo/%d", eventfd);
  const Fd file(::open(path.data(), O_RDONLY | O_CLOEXEC));
  std::array<char, 512> text{};
  if (!file || ::read(file.get(), text.data(), text.size() - 1) <= 0) return 0;
  constexpr char kKey[] = "eventfd-id:";
  const char* const id = std::strstr(text.data(), kKey);
  if (!id) return 0;
  return static_cast<std::uint64_t>(eventfd) << 32 | (std::strtoul(id + sizeof kKey - 1, nullptr, 10) + 1);
}

bool CallersEvents::signal(PeerProcess& peer) noexcept {
  SegmentHeader& header = peer.segment().header();
  if (header.callers_armed.load(std::memory_order_seq_cst) == 0 ||
      header.callers_armed.exchange(0, std::memory_order_seq_cst) == 0)
    return false;
  bool all = true;
  for (std::size_t i = 0; i < kMaxCallersEvents; ++i) {
    const std::uint64_t word = header.callers_events[i].load(std::memory_order_acquire);
    if (word == 0) break;
    Copy& copy = copies_[i];
    if (copy.word != word) copy = {word, fetch(peer, word)};
    all &= copy.fd && ::eventfd_write(copy.fd.get(), 1) == 0;
  }
  return all;
}

}  // namespace nixl::core::samehost
