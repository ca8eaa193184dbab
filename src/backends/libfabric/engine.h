// The rails and everything under way on them, behind one lock: operations, messages, and the jobs that issue them. Every
// function named *_locked needs the lock, here and in Link, Callers and Lane.
#pragma once
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/libfabric/messages.h"
#include "backends/libfabric/options.h"
#include "backends/libfabric/rail.h"
#include "base/clock.h"

namespace nixl::core::libfabric {

class Engine;

// Something that issues operations until it is done.
class Job {
 public:
  enum class Next { kNothing, kMore, kBlocked };
  virtual ~Job() = default;
  // Issues a bounded number of operations. kMore: call again at once; kBlocked: libfabric or the limit of operations had no
  // room, try again later.
  virtual Next advance_locked() = 0;
  // One operation ended, with an error of libfabric or 0.
  virtual void completed_locked(const Operation& operation, long error) = 0;

 private:
  friend class Engine;
  bool queued_ = false, blocked_ = false;
};

// What the owner of an engine does with what happens there.
class Receiver {
 public:
  virtual ~Receiver() = default;
  virtual void received_locked(Rail& rail, std::string_view bytes) = 0;
  // Looks after whatever time changes; the time when it wants to be called again. `late`: after the time asked for.
  virtual Nanoseconds tick_locked(Nanoseconds now, Nanoseconds late) = 0;
};

// Messages to one address, in order. Destroying it forgets what has not left.
class Outbox {
 public:
  Outbox(Engine& engine, Rail& rail, fi_addr_t peer, std::function<void(const Error&)> on_error);
  ~Outbox();
  Outbox(const Outbox&) = delete;
  Outbox& operator=(const Outbox&) = delete;

  void post_locked(std::string bytes);  // at most kFrameBytes
  // Forgets what has not left, and the fate of what has.
  void clear_locked();
  bool idle_locked() const noexcept { return queue_.empty() && in_flight_ == 0; }
  // When something had to wait first that waits still; 0: nothing does.
  Nanoseconds waits_since() const noexcept { return waits_since_; }
  Rail& rail() const noexcept { return *rail_; }
  fi_addr_t peer() const noexcept { return peer_; }

 private:
  friend class Engine;
  Engine* const engine_;
  Rail* const rail_;
  const fi_addr_t peer_;
  const std::function<void(const Error&)> on_error_;
  std::deque<std::string> queue_;
  int in_flight_ = 0;
  Nanoseconds waits_since_ = 0;
  long error_ = 0;  // of a message that could not be sent, until the owner is told
};

// A buffer for one message, registered where the provider asks for it.
struct Frame {
  char* bytes = nullptr;
  void* descriptor = nullptr;
  Rail* rail = nullptr;
  Outbox* owner = nullptr;  // while it is being sent
  bool incoming = false;
  Operation operation;
};

class Engine {
 public:
  static Result<std::unique_ptr<Engine>> open(const Api& api, const Options& options, Provider provider,
                                              Receiver& receiver);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // What lock() locks; may be kept longer than the engine.
  const std::shared_ptr<std::mutex>& mutex() const noexcept { return mutex_; }
  // Polling threads step aside for whoever waits here.
  std::unique_lock<std::mutex> lock();
  // Makes progress if nobody else is doing so; true when something happened.
  bool progress();
  bool progress_locked();
  // false: there is work now. true: wait_fds() show when there is; `next` is lowered to the first time that matters.
  bool arm(Deadline& next);
  std::vector<int> wait_fds() const;

  // Has advance_locked() called by the next progress.
  void queue_locked(Job& job);
  void forget_locked(Job& job);
  // Forgets a job with operations in flight: what they come to is of no interest any more.
  void orphan_locked(Job& job);
  // Null: post_queue_size operations are in flight. Given back where libfabric refuses it, else by its completion.
  Operation* take_operation_locked(Job& job, unsigned rail);
  void give_back_locked(Operation& operation);
  // Somebody waits for something at that time, or earlier than he said.
  void tick_at_locked(Nanoseconds when) noexcept { next_tick_ = std::min(next_tick_, when); }

  const std::vector<std::unique_ptr<Rail>>& rails() const noexcept { return rails_; }
  const Options& options() const noexcept { return options_; }
  const Api& api() const noexcept { return *api_; }
  const std::string& provider() const noexcept { return provider_; }

 private:
  friend class Outbox;
  struct Buffers {
    std::unique_ptr<char[]> bytes;
    std::unique_ptr<Mapping> mapping;
    std::vector<std::unique_ptr<Frame>> frames;
  };

  Engine(const Api& api, const Options& options, Receiver& receiver)
      : api_(&api), options_(options), receiver_(&receiver) {}
  Result<void> add_buffers(Rail& rail);
  bool collect_locked(Rail& rail);
  void ended_locked(const Completion& completion);
  void deliver_locked();
  void pump_locked(Outbox& outbox);
  void send_some_locked(Outbox& outbox);
  void pump_all_locked();
  void report_failures_locked();
  void advance_jobs_locked();

  const Api* api_;
  const Options options_;
  Receiver* const receiver_;
  std::string provider_;
  std::vector<std::unique_ptr<Rail>> rails_;
  std::vector<Buffers> buffers_;                  // one a rail
  std::vector<std::vector<Frame*>> free_frames_;  // outgoing, by rail
  std::vector<Frame*> to_post_, arrived_;
  std::vector<std::size_t> arrived_bytes_;
  std::vector<Outbox*> pending_, failed_;

  std::deque<Operation> operations_;
  std::vector<Operation*> free_operations_;
  std::uint64_t num_in_flight_ = 0;

  const std::shared_ptr<std::mutex> mutex_ = std::make_shared<std::mutex>();
  std::atomic<int> waiting_{0};
  std::vector<Job*> queue_, walking_;
  Nanoseconds next_tick_ = 0;
  Nanoseconds happened_at_ = 0;  // the last completion
};

}  // namespace nixl::core::libfabric
