// What keeps an agent's transfers moving: progress over all its backends, by a thread that sleeps when nothing happens or
// inside the caller's own calls; the requests under way; the inbox; and the events that callers can wait for.
//
// Threads: everything may be called from any thread. Lock order: a request's own mutex comes before every mutex in here.
#pragma once
#include <array>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "agent/slot.h"
#include "base/clock.h"
#include "base/fd.h"

namespace nixl::core {

class Request;
class Telemetry;
class Tracer;

class Runtime final : public Events {
 public:
  struct Options {
    std::string agent;
    bool progress_thread = true;
    struct Loss {
      PeerId peer;
      Error why;
      bool expected = false;  // nobody need be alarmed
    };
    std::function<void(const Loss&)> on_lost;  // called with no lock held
    std::function<bool(const PeerId&)> gone;   // as Events::surely_gone
    Telemetry* telemetry = nullptr;            // null: off
    Tracer* tracer = nullptr;                  // null: off
  };
  static Result<std::unique_ptr<Runtime>> open(Options options);
  ~Runtime() override;  // stops the thread; requests and slots must be gone
  void stop() noexcept;

  void add_slot(Slot& slot);
  bool has_thread() const noexcept { return thread_.joinable(); }
  Telemetry* telemetry() const noexcept { return options_.telemetry; }
  Tracer* tracer() const noexcept { return options_.tracer; }

  // Progress in the caller when there is no thread, or while the thread leaves it to callers who poll all the time.
  void help() {
    if (!has_thread()) {
      drive();
    } else {
      num_polls_.fetch_add(1, std::memory_order_relaxed);
      if (aside_.load(std::memory_order_relaxed)) drive();
    }
  }
  bool drive();
  // The thread looks again, if it sleeps.
  void nudge() noexcept;

  // Requests under way. `watched` ones are polled by drive() and by the thread.
  void enter(std::shared_ptr<Request> request, bool watched);
  void watch(const std::shared_ptr<Request>& request);
  void leave(const Request& request) noexcept;
  std::vector<std::shared_ptr<Request>> under_way() const;

  // Messages. `which` null: all backends and ourselves; otherwise those backends only.
  void deliver_to_self(std::string message);
  void drain(const std::vector<Slot*>* which, std::vector<Notification>& out);

  // Acts on losses that backends have told since; what callers know of peers is up to date afterwards. No lock may be held.
  void handle_lost();
  bool any_lost() const noexcept { return any_lost_; }

  // Told by requests and backends.
  void terminal() noexcept;
  void peer_lost(const PeerId& peer, Error why) noexcept override { note_loss({peer, std::move(why), false}); }
  void peer_left(const PeerId& peer, Error why) noexcept override { note_loss({peer, std::move(why), true}); }
  bool surely_gone(const PeerId& peer) const noexcept override { return options_.gone(peer); }

  // Waits until some request became terminal after `seen` (a value of events_seen) or the deadline; progresses meanwhile.
  std::uint64_t events_seen() const noexcept { return num_terminal_.load(); }
  void wait_event(std::uint64_t seen, Deadline deadline);
  struct Waiter {  // while it lives, terminal() wakes wait_event()
    explicit Waiter(Runtime& owner) : runtime(owner) { ++runtime.num_waiters_; }
    ~Waiter() { --runtime.num_waiters_; }
    Runtime& runtime;
  };
  // A new descriptor that polls readable after a request became terminal or a message arrived; its reader empties it. It is
  // closed with the runtime. Needs the progress thread.
  Result<int> event_fd();

 private:
  explicit Runtime(Options options) : options_(std::move(options)) {}
  void loop();
  void stand_aside();
  bool sleep(int timeout_ms);
  void poll_watched();
  bool fill_inbox();
  bool fill_inbox_locked();
  void signal_event() noexcept;
  void note_loss(Options::Loss loss) noexcept;
  std::size_t num_slots() const noexcept { return num_slots_.load(std::memory_order_acquire); }

  const Options options_;
  std::array<Slot*, kMaxSlots> slots_{};
  std::atomic<std::size_t> num_slots_{0};
  std::mutex grow_mutex_;

  mutable std::mutex requests_mutex_;
  std::vector<std::shared_ptr<Request>> under_way_;
  std::vector<std::shared_ptr<Request>> watched_;
  std::atomic<std::size_t> num_watched_{0};

  std::mutex inbox_mutex_;
  std::vector<std::pair<Slot*, Notification>> inbox_;  // slot null: from ourselves

  std::mutex lost_mutex_;
  std::vector<Options::Loss> lost_;
  std::atomic<bool> any_lost_{false};

  std::mutex event_mutex_;
  std::condition_variable event_cv_;
  std::atomic<std::uint64_t> num_terminal_{0};
  std::atomic<int> num_waiters_{0};
  std::vector<Fd> event_fds_;  // under event_mutex_
  std::atomic<bool> event_fd_used_{false};

  Fd wake_;
  std::atomic<bool> asleep_{false}, aside_{false}, stopping_{false};
  std::atomic<std::uint32_t> num_polls_{0};  // by callers
  std::thread thread_;
};

}  // namespace nixl::core
