// Where a thread that drives an engine sleeps: until the rails, somebody who has work, or the time wakes it.
#pragma once
#include <atomic>

#include "backends/libfabric/engine.h"
#include "base/fd.h"

namespace nixl::core::libfabric {

class Sleeper {
 public:
  // Null engine: only wake() and note_news() wake it.
  Result<void> open(Engine* engine);
  int event_fd() const noexcept { return events_.get(); }
  // false: there is work now. true: event_fd() becomes readable when there is.
  bool arm() noexcept;
  // There is work that no event announces. Any thread.
  void wake() noexcept;
  // As wake(); the next arm() refuses, too.
  void note_news() noexcept;

 private:
  Engine* engine_ = nullptr;
  Fd events_, wake_, timer_;
  std::atomic<bool> sleeping_{false}, news_{false};
};

}  // namespace nixl::core::libfabric
