// One UCX worker and the jobs that run on it. UCX is entered by any thread, one at a time: every function named
// *_locked, and everything of Link and Job, needs the worker's lock.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "backends/ucx/context.h"
#include "backends/ucx/messages.h"
#include "base/clock.h"

namespace nixl::core::ucx {

class Link;
class Worker;

// Something that issues operations over a link until it is done. Completions arrive while the worker makes progress.
class Job {
 public:
  virtual ~Job() = default;
  // Issues a bounded amount of work; true when there is more to issue at once.
  virtual bool advance_locked() = 0;
  // One operation of this job ended.
  virtual void completed_locked(ucs_status_t status) = 0;
  // The link is up (again): start, or start over. It went down: what is in flight will complete with errors, and either
  // link_up or link_lost follows. It is gone for good: no new operation may be issued.
  virtual void link_up_locked() = 0;
  virtual void link_down_locked() = 0;
  virtual void link_lost_locked(const Error& why) = 0;
  // The link is about to be destroyed with operations of this job in flight: from now on only count them.
  virtual void abandon_locked() = 0;

 private:
  friend class Worker;
  bool queued_ = false;
};

// What the owner of a worker does with what happens on it.
class Receiver {
 public:
  virtual ~Receiver() = default;
  virtual void received_locked(Worker& worker, MessageId id, std::string_view bytes) = 0;
  virtual void link_lost_locked(Link& link, const Error& why) = 0;
  // Has the process on the other side surely ended?
  virtual bool surely_gone(const Link& link) const = 0;
  // A job that the agent polls for has ended.
  virtual void job_ended_locked(Worker& worker) = 0;
  // After every round of progress: the place to destroy links and jobs that ended in it.
  virtual void settled_locked(Worker& worker) = 0;
};

class Worker {
 public:
  static Result<std::unique_ptr<Worker>> open(const Context& context, Receiver& receiver, unsigned index);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  // The lock; polling threads step aside for whoever waits here.
  // What lock() locks; may be kept longer than the worker.
  const std::shared_ptr<std::mutex>& mutex() const noexcept { return mutex_; }
  std::unique_lock<std::mutex> lock();
  // Makes progress if nobody else is doing so; true when something happened.
  bool progress();
  bool progress_locked();
  // false: there is work now. true: event_fd() shows when there is; `next` is lowered to the first time that matters.
  bool arm(Deadline& next);
  int event_fd() const noexcept { return event_fd_; }

  // Has advance_locked() called by the next progress.
  void queue_locked(Job& job);
  void forget_locked(Job& job);
  void job_ended_locked() { receiver_->job_ended_locked(*this); }

  struct Piece {
    void* local = nullptr;
    std::uint64_t remote = 0, length = 0;
    ucp_mem_h memory = nullptr;
    ucp_rkey_h key = nullptr;
  };
  // Start an operation for a job: true = in flight, completed_locked() follows; false = finished already.
  Result<bool> put_locked(Job& job, ucp_ep_h ep, const Piece& piece);
  Result<bool> get_locked(Job& job, ucp_ep_h ep, const Piece& piece);
  Result<bool> flush_locked(Job& job, ucp_ep_h ep);
  // One active message; the bytes are kept until they left.
  Result<void> send_locked(ucp_ep_h ep, MessageId id, std::string bytes);

  const Api& api() const noexcept { return context_->api(); }
  const Context& context() const noexcept { return *context_; }
  const std::string& address() const noexcept { return address_; }
  unsigned index() const noexcept { return index_; }

 private:
  friend class Link;
  struct Binding {
    Worker* worker = nullptr;
    MessageId id{};
  };

  Worker() = default;
  Result<void> start(unsigned index);
  Result<bool> started(ucs_status_ptr_t request, const char* what);
  ucp_request_param_t parameters(Job& job, ucp_mem_h memory) const;
  void settle_locked();
  void excuse_gap_locked();
  static void on_completed(void* request, ucs_status_t status, void* job);
  static void on_sent(void* request, ucs_status_t status, void* bytes);
  static ucs_status_t on_message(void* binding, const void* header, std::size_t header_length, void* data,
                                 std::size_t length, const ucp_am_recv_param_t* param);

  const Context* context_ = nullptr;
  Receiver* receiver_ = nullptr;
  ucp_worker_h handle_ = nullptr;
  int event_fd_ = -1;
  unsigned index_ = 0;
  std::string address_;
  Binding bindings_[kNumMessageIds];

  const std::shared_ptr<std::mutex> mutex_ = std::make_shared<std::mutex>();
  std::atomic<int> waiting_{0};
  std::atomic<bool> quiet_{false};
  std::atomic<unsigned> num_looks_{0};
  unsigned idle_rounds_ = 0;
  bool owes_look_ = false;  // arming was refused, and no progress has been made since
  int num_jobs_ = 0;        // that links know of
  std::vector<Job*> queue_, walking_;
  std::vector<Link*> failed_, connecting_;
  Nanoseconds looked_at_ = 0;  // when progress was last made while somebody was connecting
  std::vector<std::pair<MessageId, std::string>> arrived_;
};

}  // namespace nixl::core::ucx
