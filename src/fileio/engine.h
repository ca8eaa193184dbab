// Engine: runs prepared lists of file reads and writes to the end. It merges neighbours, splits what direct I/O cannot
// take, continues short reads and writes, charges every error to the request it belongs to, and gives memory back only
// when the kernel is done with it.
//
// Threads: everything here may be called from any thread; calls on one Request are serialised by the caller.
#pragma once
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "fileio/file.h"
#include "fileio/queue.h"

namespace nixl::core::fileio {

enum class EngineKind { kAutomatic, kUring, kLinuxAio, kPosixAio };

struct EngineConfig {
  EngineKind kind = EngineKind::kAutomatic;  // other than automatic: every file goes through it, or open() fails
  std::uint32_t depth = 256;                 // Ios in the kernel at once
  unsigned num_threads = 2;                  // for files in the page cache and for copies through host buffers
};

// Bytes between memory and a file.
struct Piece {
  const File* file = nullptr;  // outlives the request
  std::uint64_t offset = 0;
  std::byte* memory = nullptr;
  std::uint64_t bytes = 0;
  Copier* copier = nullptr;  // memory that the kernel cannot use in place
};

class Request;

class Engine {
 public:
  static Result<std::unique_ptr<Engine>> open(const EngineConfig& config);
  // With queues of the caller's choice (tests, fault injection). `threads` must copy.
  static std::unique_ptr<Engine> with_queues(std::unique_ptr<Queue> kernel, std::unique_ptr<Queue> threads,
                                             bool forced);
  // Cancels what is running and waits until the kernel has let go of all memory.
  ~Engine();

  // Which queue serves direct files ("libaio"), and why the ones before it were not taken ("" if it was the first
  // choice).
  std::string_view kernel_queue() const noexcept;
  const std::string& reason() const noexcept { return reason_; }

  Result<std::unique_ptr<Request>> prepare(bool write, std::span<const Piece> pieces);

  enum class State { kIdle, kRunning, kDone, kFailed };
  Result<State> start(Request& request);  // kBusy while it runs
  State poll(Request& request);           // makes progress; kFailed: see error_of
  static const Error& error_of(const Request& request) noexcept;
  // Asks to stop; true when it has ended. Afterwards poll() says kFailed with kCancelled, unless it had finished
  // before.
  bool cancel(Request& request) noexcept;
  static std::string path_of(const Request& request);  // "libaio", "threads", "libaio+threads", "staged"

  bool progress() noexcept;  // true when something moved

  // Readable when progress() has work after arm() answered true; -1 when the chosen queue cannot tell.
  int event_fd() const noexcept { return event_.get(); }
  bool arm() noexcept;

 private:
  friend class Request;
  static constexpr int kKernel = 0, kThreads = 1, kNumLanes = 2;
  struct Slot {
    Request* request = nullptr;
    std::uint32_t job = 0;
    std::uint64_t done = 0;
    std::vector<iovec> rest;  // what a short read or write left over
    int fd = -1;
  };
  struct Lane {
    std::unique_ptr<Queue> queue;
    std::vector<Slot> slots;
    std::vector<std::uint32_t> free, retry;
    std::deque<Request*> runnable;  // has jobs not yet given to the queue
  };

  Engine() = default;
  void adopt(std::unique_ptr<Queue> kernel, std::unique_ptr<Queue> threads, bool forced);
  Result<void> watch_queues();
  bool advance_locked() noexcept;
  bool pump_locked(int lane) noexcept;
  void complete_locked(int lane, const Done& done) noexcept;
  void settle_locked(Request& request) noexcept;
  void tell_locked() noexcept;
  void refuse_locked(int lane, std::span<const Io> batch, const Error& error) noexcept;
  Io io_of(int lane, std::uint32_t slot) const noexcept;
  void run_inline(Request& request);

  std::mutex mutex_;
  bool forced_ = false;
  bool closing_ = false;
  std::string reason_;
  Fd event_;
  Fd told_;  // an eventfd of event_, for workers that did what progress() does
  bool worked_ = false, armed_ = false;
  std::atomic<std::uint32_t> running_{0};
  Lane lanes_[kNumLanes];  // last member: its queues stop before the rest goes
};

}  // namespace nixl::core::fileio
