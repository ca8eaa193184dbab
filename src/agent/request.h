// One transfer request: prepared once, posted any number of times, one post at a time.
//
// States: created -post-> running or queued -> done or failed; posting a finished one starts it anew. Terminal results are kept
// until the next post. All functions may be called from any thread; each takes the request's mutex for a short, bounded time
// (release and stop: at most kStopTime while the system finishes I/O that cannot be cancelled).
#pragma once
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "agent/router.h"
#include "agent/runtime.h"

namespace nixl::core {

struct TransferTimes {
  std::int64_t start_us = 0;  // CLOCK_MONOTONIC
  std::int64_t post_us = 0, transfer_us = 0;
  std::uint64_t total_bytes = 0, num_descs = 0;
};

class Request : public std::enable_shared_from_this<Request> {
 public:
  struct Parts {
    Runtime* runtime = nullptr;
    std::shared_ptr<Peer> peer;
    PeerLink* link = nullptr;
    Slot* asked = nullptr;  // the backend users are told
    Slot* slot = nullptr;   // the one that runs it
    Op op = Op::kWrite;
    std::optional<std::string> message;
    // Sends `message` to the peer by another backend, for backends without a Notifier.
    std::function<Result<void>(Peer&, std::string_view)> send_message;
  };
  static Result<std::shared_ptr<Request>> make(Parts parts, BuiltPlan built);
  ~Request();

  // true: done. nullopt keeps the message given before.
  Result<bool> post(std::optional<std::string_view> message);
  Result<bool> check();
  // true: done; false: the deadline passed first.
  Result<bool> wait(Deadline deadline);
  // Ends a running post; afterwards check() answers kCancelled. kBusy: something in flight cannot be stopped yet.
  Result<void> cancel();
  // Gives everything back. kBusy as above, and the request stays usable.
  Result<void> release();

  const std::string& backend() const noexcept { return parts_.asked->name(); }
  std::uint32_t backend_id() const noexcept { return parts_.asked->id; }
  Result<std::string> path();
  Result<CostEstimate> estimate();
  Result<TransferTimes> times();

  // For the runtime and the agent.
  void poll_if_free();
  void stop(const Error& why);  // as cancel, with another error
  bool close();                 // the agent goes; false: could not be stopped, everything of it must be left alone
  const Peer* peer() const noexcept { return parts_.peer.get(); }

  static constexpr Nanoseconds kStopTime = 2'000'000'000;

 private:
  enum class State { kCreated, kQueued, kRunning, kDone, kFailed };
  Request(Parts parts, BuiltPlan& built);
  bool under_way() const noexcept { return state_ == State::kRunning || state_ == State::kQueued; }
  Result<void> check_open() const;
  Result<Runtime*> runtime();
  Result<void> check_peer() const;
  bool acquire();
  void give_back();
  void submit();
  void poll();
  bool try_stop(const Error& why);
  void finish(std::optional<Error> error);
  Result<bool> outcome() const;

  std::mutex mutex_;
  Parts parts_;
  std::unique_ptr<Transfer> transfer_;
  std::vector<std::shared_ptr<LocalEntry>> ours_;
  std::vector<std::shared_ptr<RemoteEntry>> theirs_;
  const bool core_delivers_;  // the message is not the backend's business
  State state_ = State::kCreated;
  bool entered_ = false;  // known to the runtime
  bool released_ = false;
  Error error_;
  TransferTimes times_;
  Nanoseconds started_ns_ = 0;
  std::string traced_as_;    // for the tracer, if there is one
  std::uint64_t range_ = 0;  // its range of the post that runs; 0: none
};

}  // namespace nixl::core
