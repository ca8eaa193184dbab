// Line: the connection to one peer. A thread of its own calls the peer's post office, opens its segment with the engine, sends messages
// and notices the peer's end.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "backends/mooncake/engine.h"
#include "backends/mooncake/post_office.h"
#include "backends/mooncake/wire.h"
#include "contract/backend.h"
#include "net/channel.h"
#include "net/wait.h"

namespace nixl::core::mooncake {

class Line final : public Connection {
 public:
  enum class State { kCalling, kReady, kLost };
  struct Owner {  // outlives the line
    Engine& engine;
    PostOffice& office;
    PeerId self;
    Events* events;
    net::Wakeup& news;  // woken when the state has changed
  };
  static Result<std::unique_ptr<Line>> open(const Owner& owner, const PeerId& peer, Contact contact);
  // To ourselves: ready at once, without a thread.
  static Result<std::unique_ptr<Line>> open_to_self(const Owner& owner);
  ~Line() override;  // gives messages up to a second to leave
  Result<void> wait_ready(Deadline deadline) override;

  Result<void> send(std::string_view message);
  // The peer has told of memory that the engine may not know yet: its segment is opened anew before the next use.
  void refresh();

  const PeerId& peer() const noexcept { return peer_; }
  // The segment to use now; nullopt: not yet. An error once the peer is lost.
  Result<std::optional<int>> segment() const;
  bool lost();        // looks at the socket
  Error why() const;  // valid once lost
  Nanoseconds lost_at() const noexcept { return lost_at_; }

  // Requests that the engine may have under way to this peer at once; it refuses those above its own limit.
  static constexpr std::uint32_t kMaxRequests = 1024;
  std::uint32_t num_requests = 0;  // guarded by the backend's lock of transfers

 private:
  Line(Owner owner, PeerId peer, Contact contact, net::Wakeup wakeup)
      : owner_(owner), peer_(std::move(peer)), contact_(std::move(contact)), wakeup_(std::move(wakeup)) {}
  void run();
  Result<void> call();
  Result<net::Channel> dial();
  Result<void> serve();
  Result<void> open_segment();
  Result<void> read_answer();
  Result<void> send_queued();
  void end(Error why);

  const Owner owner_;
  const PeerId peer_;
  const Contact contact_;
  net::Wakeup wakeup_;
  std::unique_ptr<net::Channel> channel_;  // made by the thread; under mutex_ until then
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  State state_ = State::kCalling;
  int segment_ = -1;
  bool stale_ = false, reopening_ = false;
  std::deque<std::string> queue_;  // frames
  bool sending_ = false;
  bool left_ = false;  // the peer has said goodbye
  Error why_;
  std::atomic<Nanoseconds> lost_at_{0};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace nixl::core::mooncake
