// One endpoint to one worker of a peer. No data crosses it before the peer has answered our hello: the process behind
// an address may be another one by now. A link that breaks, or whose first attempt fails, is opened again; two failures
// without an answer between them, or no answer in time, end it.
#pragma once
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "backends/ucx/worker.h"

namespace nixl::core::ucx {

class Link {
 public:
  enum class State { kConnecting, kReady, kLost };
  struct Target {
    std::string name, address;
    std::uint64_t incarnation = 0;
    bool answer_only = false;  // opened to answer a peer that called: usable at once, not opened again when it breaks
    bool is_self = false;      // our own agent: no hello, no failure detection
    bool peer_errors = true;
    bool force_close = false;
  };
  // Who we are in the hello.
  struct Caller {
    std::string name;
    std::uint64_t incarnation = 0;
    Nanoseconds connect_ns = 10'000'000'000, reconnect_ns = 2'000'000'000;
  };

  // kIo: no transport reaches that address; the reason names the transports asked for. `caller` outlives the link.
  static Result<std::unique_ptr<Link>> open_locked(Worker& worker, Target target, const Caller& caller);
  // Drops the endpoint, after sending what is queued when the link is up (bounded by `linger`). Jobs that are left,
  // because a peer that stopped holds their operations, are abandoned.
  void close_locked(Nanoseconds linger);
  ~Link() = default;  // close_locked() first

  State state() const noexcept { return state_; }
  const Error& lost_because() const noexcept { return why_; }
  ucp_ep_h endpoint() const noexcept { return ep_; }
  std::uint64_t generation() const noexcept { return generation_; }  // of the endpoint: keys are unpacked anew for each
  Worker& worker() const noexcept { return *worker_; }
  const Target& target() const noexcept { return target_; }
  std::uint64_t id() const noexcept { return id_; }
  Deadline deadline() const noexcept { return deadline_; }

  // The peer answered.
  void acknowledged_locked(const HelloAck& ack);
  // The peer said that it closes.
  void dismissed_locked();
  // Its end alarms nobody: the peer closed it, or nothing ever crossed it.
  bool missed_by_none() const noexcept { return dismissed_ || !used_; }
  void failed_locked();
  // Opens again what broke a moment ago, and ends what has waited too long.
  void check_deadline_locked();
  void excuse_locked(Nanoseconds time);  // has so much more to be answered
  void lose_locked(Error why);

  void join_locked(Job& job);
  void leave_locked(Job& job);

  // Queues a notification; it leaves in order, again after a broken link unless the peer has it.
  Result<void> notify_locked(std::string_view text);

  // "tcp/eth0", "rc_mlx5/mlx5_0:1+..."
  const std::string& path() const noexcept { return path_; }
  // No transport of this link fetches by itself: reading has to be asked for.
  bool reads_by_request() const noexcept { return reads_by_request_; }
  bool only_tcp() const noexcept { return only_tcp_; }

 private:
  friend class Worker;
  struct Sent {
    std::uint64_t sequence;
    std::string bytes;
  };

  Link() = default;
  Result<void> open_endpoint_locked(Nanoseconds patience);
  void drop_endpoint_locked(bool clean);
  void describe();
  void send_history_locked();
  static void on_error(void* link, ucp_ep_h ep, ucs_status_t status);

  Worker* worker_ = nullptr;
  const Caller* caller_ = nullptr;
  Target target_;
  ucp_ep_h ep_ = nullptr;
  std::uint64_t id_ = 0, generation_ = 0;
  State state_ = State::kConnecting;
  int num_attempts_ = 0;  // endpoints opened since the peer answered last
  bool used_ = false;     // it was ready, or something waits for it
  bool dismissed_ = false;
  Nanoseconds again_ =
      0;  // > 0: the endpoint broke; at the deadline another is opened, which has this long to be answered
  ucs_status_t failure_ = UCS_OK;
  Error why_;
  Deadline deadline_ = Deadline::never();
  std::vector<Job*> jobs_;

  std::deque<Sent> history_;  // not yet sent, and the last ones sent
  std::size_t history_bytes_ = 0;
  std::uint64_t next_sequence_ = 0, next_to_send_ = 0;

  std::string path_;
  bool reads_by_request_ = false, only_tcp_ = false;
};

}  // namespace nixl::core::ucx
