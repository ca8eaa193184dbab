#include "net/wait.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>

namespace nixl::core::net {

Result<bool> wait_any(std::span<pollfd> entries, Deadline deadline) {
  for (;;) {
    const int wait_ms = deadline.at() == Deadline::never().at() ? -1 : deadline.left_ms();
    const int ready = ::poll(entries.data(), entries.size(), wait_ms);
    if (ready > 0) return true;
    if (ready == 0 && deadline.passed()) return false;
    if (ready < 0 && errno != EINTR) return fail(errno_error("poll", errno));
  }
}

Result<void> wait_for(int fd, short events, Deadline deadline, std::string_view what) {
  pollfd entry{fd, events, 0};
  NIXL_ASSIGN(const bool ready, wait_any({&entry, 1}, deadline));
  if (!ready) return fail(Code::kTimeout, "waiting for %.*s: the time limit passed", int(what.size()), what.data());
  return {};
}

Result<Wakeup> Wakeup::open() {
  Fd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!fd) return fail(errno_error("eventfd", errno));
  return Wakeup(std::move(fd));
}

void Wakeup::wake() noexcept {
  const std::uint64_t one = 1;
  (void)!::write(fd_.get(), &one, sizeof(one));  // fails only when the counter is full, which also wakes
}

void Wakeup::clear() noexcept {
  std::uint64_t count;
  (void)!::read(fd_.get(), &count, sizeof(count));
}

}  // namespace nixl::core::net
