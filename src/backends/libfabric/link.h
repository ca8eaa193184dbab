// The way to one peer: one path a rail of ours that reaches one of its rails. No data crosses a path before the peer has
// answered our hello over it: the process behind an address may be another one by now. When a path breaks, all are asked
// again and what was under way starts over; a link that nobody answers in time is lost.
#pragma once
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "backends/libfabric/engine.h"
#include "backends/libfabric/knock.h"
#include "contract/backend.h"

namespace nixl::core::libfabric {

class Link;

// A job over a link.
class LinkJob : public Job {
 public:
  // The link is up (again): start, or start over. It went down: what is in flight will complete with errors, and either
  // link_up or link_lost follows. It is gone for good. It is about to be destroyed: end, whatever is in flight.
  virtual void link_up_locked() = 0;
  virtual void link_down_locked() = 0;
  virtual void link_lost_locked(const Error& why) = 0;
  virtual void abandon_locked() = 0;
};

// What a backend is told of its links and gives them.
class LinkOwner {
 public:
  virtual ~LinkOwner() = default;
  virtual void link_lost_locked(Link& link) = 0;
  // Has the process on the other side surely ended?
  virtual bool surely_gone(const PeerId& peer) const = 0;
};

class Link {
 public:
  enum class State { kConnecting, kReady, kLost };
  // Where a path leads: our rail, the peer's, and its address there.
  struct Target {
    Rail* rail = nullptr;
    std::uint32_t remote_rail = 0;
    std::string address;
  };
  struct Settings {
    PeerId self;
    Nanoseconds connect_ns = 10'000'000'000, reconnect_ns = 2'000'000'000;
  };
  struct Path {
    Rail* rail = nullptr;
    std::uint32_t remote_rail = 0;
    fi_addr_t peer = FI_ADDR_UNSPEC;
    std::unique_ptr<Outbox> outbox;
    bool up = false;
    int num_failures = 0;  // since the peer answered last
    int num_hellos = 0;
    Nanoseconds again_at = 0;  // > 0: then another hello is sent
    std::string address;
    Knock knock;
  };

  // kMismatch: an address is none. `settings` outlives the link.
  static Result<std::unique_ptr<Link>> open_locked(Engine& engine, LinkOwner& owner, const Settings& settings,
                                                   const PeerId& peer, bool driven, const std::vector<Target>& targets);
  // Sends what is queued, for `linger` at most, and says good-bye.
  void close_locked(Nanoseconds linger);
  ~Link();

  State state() const noexcept { return state_; }
  const Error& lost_because() const noexcept { return why_; }
  const PeerId& peer() const noexcept { return peer_; }
  std::uint64_t id() const noexcept { return id_; }
  // It went when nobody had to do with it, or said so: no cause for alarm.
  bool missed_by_none() const noexcept { return dismissed_ || !used_; }
  std::vector<const Path*> paths_up() const;
  std::string describe() const;

  void acknowledged_locked(const HelloAck& ack);
  void heard_locked() noexcept { heard_at_ = now_ns(); }
  // The peer misses notifications.
  void gap_locked();
  void dismissed_locked();
  // An operation over the link met a broken way.
  void broke_locked(const Error& why);
  void lose_locked(Error why);
  // Acts on what is due; the time of the next.
  Nanoseconds tick_locked(Nanoseconds now);
  // So much time passed in which nobody drove this side: not the peer's fault.
  void excuse_locked(Nanoseconds time) noexcept;

  void join_locked(LinkJob& job);
  void leave_locked(LinkJob& job) { std::erase(jobs_, &job); }

  // Queues a notification; it leaves in order, again after a broken link unless the peer has it.
  Result<void> notify_locked(std::string_view text);

 private:
  struct Sent {
    std::uint64_t sequence;
    std::string text;
  };

  Link(Engine& engine, LinkOwner& owner, const Settings& settings, PeerId peer, bool driven);
  Result<void> add_path_locked(const Target& target);
  void say_hello_locked(Path& path);
  void post_hello_locked(Path& path, std::size_t index);
  void path_failed_locked(Path& path, const Error& why);
  void ask_again_locked();
  void send_history_locked();
  void drop_locked() noexcept;
  Error no_answer(bool refused, bool again) const;
  Nanoseconds tick_connecting_locked(Nanoseconds now);
  Nanoseconds tick_ready_locked(Nanoseconds now);
  Outbox& control() noexcept { return *paths_[control_].outbox; }

  Engine* const engine_;
  LinkOwner* const owner_;
  const Settings* const settings_;
  const PeerId peer_;
  const bool driven_;  // the peer answers whatever its program does
  const std::uint64_t id_;
  std::deque<Path> paths_;
  std::size_t control_ = 0;  // the path of messages: the first that was answered
  State state_ = State::kConnecting;
  std::uint32_t attempt_ = 1;
  bool used_ = false, dismissed_ = false;
  Error why_;
  Nanoseconds deadline_ = 0, heard_at_ = 0, pinged_at_ = 0, ping_at_ = 0;
  std::vector<LinkJob*> jobs_;

  std::deque<Sent> history_;  // not yet sent, and the last ones sent
  std::size_t history_bytes_ = 0;
  std::uint64_t next_sequence_ = 0, next_to_send_ = 0;
};

}  // namespace nixl::core::libfabric
