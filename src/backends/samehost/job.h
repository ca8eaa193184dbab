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

// One submission of `num_chunks` chunks after the other: start() .. finished() is one; start() again only then.
class Job {
 public:
  explicit Job(std::uint32_t num_chunks) : num_chunks_(num_chunks), next_(num_chunks) {}
  virtual ~Job() = default;

  void start();
  // The whole submission of a job of at most one chunk, here and now, instead of start() and what follows.
  Result<void> run_alone() {
    if (num_chunks_ > 0) NIXL_TRY(copy_chunk(0));
    return complete();
  }
  // Takes a chunk and copies it, or answers false when none is left to take. Whoever ends the last chunk calls
  // complete().
  bool run_one();
  // Ends the submission as soon as the chunks that are being copied now are through.
  void abandon(Error why) noexcept;
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

 private:
  void note(Error why) noexcept;
  void end();

  const std::uint32_t num_chunks_;
  std::atomic<std::uint32_t> next_, pending_{0};
  std::atomic<bool> finished_{true}, failed_{false};
  std::mutex mutex_;  // of error_ and ending_ until finished
  bool ending_ = false;
  std::optional<Error> error_;
};

// The copy threads of this process: started at the first large transfer, asleep when there is none, shared by all
// agents.
class CopyThreads {
 public:
  static std::shared_ptr<CopyThreads> shared();
  ~CopyThreads();
  void add(std::shared_ptr<Job> job);

 private:
  explicit CopyThreads(unsigned count);
  void work();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> jobs_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace nixl::core::samehost
