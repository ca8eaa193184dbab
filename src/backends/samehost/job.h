// A list of chunks that several threads work off together: the thread that waits for it and the copy threads.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "base/result.h"

namespace nixl::core::samehost {

// What a copy thread takes a piece of at a time; called by several threads at once.
class Work {
 public:
  virtual ~Work() = default;
  // A chunk's worth; false: this thread is not needed for it any more.
  virtual bool work() = 0;
};

// One submission of `num_chunks` chunks after the other: start() .. finished() is one; start() again only then.
class Job : public Work {
 public:
  explicit Job(std::uint32_t num_chunks) : num_chunks_(num_chunks), next_(num_chunks) {}

  virtual void start();
  // The whole submission of a job of at most one chunk, here and now, instead of start() and what follows.
  Result<void> run_alone() {
    if (num_chunks_ > 0) NIXL_TRY(copy_chunk(0));
    return complete();
  }
  // Takes a chunk and copies it, or answers false when none is left to take. Whoever ends the last chunk calls
  // complete().
  virtual bool run_one();
  bool work() override { return run_one(); }
  // Ends the submission as soon as the chunks that are being copied now are through.
  virtual void abandon(Error why) noexcept;
  bool finished() const noexcept { return finished_.load(std::memory_order_acquire); }
  // After finished(): how it went.
  const std::optional<Error>& error() const noexcept { return error_; }

 protected:
  virtual Result<void> copy_chunk(std::uint32_t index) = 0;
  // Every chunk was copied: the last checks and what follows the data. Runs once a submission, on the thread that was
  // last.
  virtual Result<void> complete() = 0;
  // After finished() turned true: by then the owner may have dropped everything but the job itself.
  virtual void announce() noexcept = 0;

  // For jobs that count their chunks in a way of their own: the first error, which spares the chunks not yet copied,
  // and the end of the submission, on one thread and once.
  void note(Error why) noexcept;
  bool failed() const noexcept { return failed_.load(std::memory_order_acquire); }
  void end();

 private:
  const std::uint32_t num_chunks_;
  std::atomic<std::uint32_t> next_, pending_{0};
  std::atomic<bool> finished_{true}, failed_{false};
  std::mutex mutex_;  // of error_ and ending_ until finished
  bool ending_ = false;
  std::optional<Error> error_;
};

// The copy threads of this process, one a core, four at most, as more gain nothing on one memory: started at the first large transfer, asleep when there is
// none, shared by all agents.
class CopyThreads {
 public:
  static constexpr unsigned kMost = 4;
  static unsigned count() noexcept;  // how many this process has, or would start
  static std::shared_ptr<CopyThreads> shared();
  ~CopyThreads();
  // `waiter`: a thread outside waits for this and works on it too, so one core is left to that one.
  void add(std::shared_ptr<Work> work, bool waiter = true);
  // Which of the copy threads the caller is, below kMost; kMost in other threads. No two have the same number.
  static unsigned index() noexcept;

 private:
  explicit CopyThreads(unsigned count);
  void work(unsigned index);

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Work>> queue_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace nixl::core::samehost
