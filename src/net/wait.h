// Waiting for descriptors, and waking a thread that does.
#pragma once
#include <poll.h>

#include <span>
#include <string_view>

#include "base/clock.h"
#include "base/fd.h"
#include "base/result.h"

namespace nixl::core::net {

// poll() with a deadline, resumed after signals. False: the deadline passed and nothing is ready.
Result<bool> wait_any(std::span<pollfd> entries, Deadline deadline);

// One descriptor, events as for poll(). kTimeout saying `what` was waited for when the deadline passes.
Result<void> wait_for(int fd, short events, Deadline deadline, std::string_view what);

// Wakes a thread blocked in wait_any on fd(). Any thread may call wake(); clear() makes it quiet again.
class Wakeup {
 public:
  static Result<Wakeup> open();
  void wake() noexcept;
  void clear() noexcept;
  int fd() const noexcept { return fd_.get(); }

 private:
  explicit Wakeup(Fd fd) noexcept : fd_(std::move(fd)) {}
  Fd fd_;
};

}  // namespace nixl::core::net
