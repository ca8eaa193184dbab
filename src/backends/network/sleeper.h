// Where a thread that drives a network's library sleeps: until a descriptor, somebody who has work, or the time wakes it.
#pragma once
#include <atomic>
#include <vector>

#include "base/clock.h"
#include "base/fd.h"
#include "base/result.h"

namespace nixl::core::network {

class Sleeper {
 public:
  // Besides wake(), note_news() and the time, what shows at the descriptors `watched` wakes it.
  Result<void> open(const char* backend, std::vector<int> watched);
  int event_fd() const noexcept { return events_.get(); }
  // false: there is work now. true: event_fd() becomes readable when there is. `quiet(next)` tells whether the watched
  // descriptors will show all work to come, and lowers `next` to the first time that matters.
  template <typename Quiet>
  bool arm(Quiet&& quiet) noexcept {
    begin();
    Deadline next = Deadline::never();
    if (news_.exchange(false) || !quiet(next)) {
      sleeping_.store(false);
      return false;
    }
    set_timer(next);
    return true;
  }
  // There is work that no event announces. Any thread.
  void wake() noexcept;
  // As wake(); the next arm() refuses, too.
  void note_news() noexcept;

 private:
  void begin() noexcept;
  void set_timer(Deadline next) noexcept;

  Fd events_, wake_, timer_;
  std::atomic<bool> sleeping_{false}, news_{false};
};

}  // namespace nixl::core::network
