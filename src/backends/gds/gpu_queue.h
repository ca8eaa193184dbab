// GpuQueue: file reads and writes of GPU memory through cuFile, on a few threads. A large list goes through cuFile's
// batches when batches are wanted; small and single pieces always through the plain calls, whose latency is far lower.
//
// Threads: everything may be called from any thread; calls on one GpuRequest are serialised by the caller.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "backends/gds/cufile.h"
#include "base/fd.h"
#include "fileio/file.h"

namespace nixl::core::gds {

// A file known to cuFile. The File stays open as long as this.
class GpuFile {
 public:
  static Result<std::unique_ptr<GpuFile>> open(const Cufile& cufile, std::shared_ptr<fileio::File> file);
  ~GpuFile() { cufile_.deregister_file(handle_); }
  FileHandle handle() const noexcept { return handle_; }
  const fileio::File& file() const noexcept { return *file_; }

 private:
  GpuFile(const Cufile& cufile, std::shared_ptr<fileio::File> file) : cufile_(cufile), file_(std::move(file)) {}
  const Cufile& cufile_;
  std::shared_ptr<fileio::File> file_;
  FileHandle handle_ = nullptr;
};

struct GpuPiece {
  std::shared_ptr<GpuFile> file;
  std::uint64_t offset = 0;
  std::byte* base = nullptr;      // as registered
  std::uint64_t base_offset = 0;  // of the piece in it
  std::uint64_t bytes = 0;
  int gpu = 0;
};

struct GpuQueueConfig {
  unsigned num_threads = 2;
  unsigned batch_pool_size = 0;  // batches at once; 0: no batches
  unsigned batch_limit = 128;    // pieces in one
  std::uint64_t max_piece_bytes = 16 << 20;
};

class GpuRequest;

class GpuQueue {
 public:
  GpuQueue(const Cufile& cufile, const GpuQueueConfig& config, Fd event);
  ~GpuQueue();  // finishes what is being moved at this moment, drops the rest

  Result<std::unique_ptr<GpuRequest>> prepare(bool write, std::vector<GpuPiece> pieces);
  enum class State { kIdle, kRunning, kDone, kFailed };
  Result<State> start(GpuRequest& request);
  static State poll(const GpuRequest& request) noexcept;
  static const Error& error_of(const GpuRequest& request) noexcept;
  bool cancel(GpuRequest& request) noexcept;  // true: ended
  int event_fd() const noexcept { return event_.get(); }
  bool drain() noexcept;

 private:
  struct Work;
  void run();
  void take_locked(Work& work);
  Error move(const GpuRequest& request, std::size_t piece, std::uint64_t done) const;
  Error move_batch(Work& work, BatchHandle batch) const;
  void settle_locked(GpuRequest& request);

  const Cufile& cufile_;
  const GpuQueueConfig config_;
  const pid_t owner_;
  Fd event_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<GpuRequest*> waiting_;
  unsigned num_batches_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

class GpuRequest {
 public:
  bool write = false, batched = false;
  std::vector<GpuPiece> pieces;
  std::size_t next = 0, left = 0, in_flight = 0;
  bool stopping = false;
  Error error;
  std::atomic<GpuQueue::State> state{GpuQueue::State::kIdle};
};

}  // namespace nixl::core::gds
