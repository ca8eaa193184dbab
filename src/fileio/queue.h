// Queue: how reads and writes reach the kernel. Four of them behind one interface: io_uring, Linux AIO, POSIX AIO and a
// pool of threads that make plain calls. What is asked comes back through `reap`, exactly once, whatever happens.
//
// A Queue is used by one thread at a time (the Engine holds its lock), `help` excepted; it never blocks there, except
// that Linux AIO may, in submit, for files that the kernel cannot read or write asynchronously (buffered ones).
// Destroying a Queue waits until the kernel is done with every buffer.
#pragma once
#include <sys/uio.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/copier.h"
#include "base/result.h"

namespace nixl::core::fileio {

struct Io {
  std::uint32_t slot = 0;  // the asker's number, comes back in Done; at most one in flight with the same number
  bool write = false;
  int fd = -1;
  std::uint64_t offset = 0;
  const iovec* iov = nullptr;  // stays valid, with the memory it names, until the Io came back
  std::uint32_t num_iov = 0;
  Copier* copier = nullptr;  // only queues with `copies()`; then at most kMaxCopyBytes in all
};

struct Done {
  std::uint32_t slot = 0;
  std::int64_t result = 0;  // bytes moved (may be fewer than asked), -errno, or kCopyFailed
};
inline constexpr std::int64_t kCopyFailed = INT64_MIN;

inline constexpr std::size_t kMaxCopyBytes = 1 << 20;

class Queue {
 public:
  virtual ~Queue() = default;
  virtual std::string_view name() const noexcept = 0;
  virtual std::uint32_t depth() const noexcept = 0;    // Ios in flight at most
  virtual std::uint32_t max_iov() const noexcept = 0;  // iovecs in one Io
  virtual bool copies() const noexcept { return false; }

  // Takes the first n of `batch` and returns n; fewer than given when the queue is full. The Ios are copied.
  virtual Result<std::size_t> submit(std::span<const Io> batch) = 0;
  // Moves finished Ios to `out`; returns how many.
  virtual std::size_t reap(std::span<Done> out) = 0;
  // Asks the kernel to give up on one; it still comes back, with -ECANCELED or its own result.
  virtual void cancel(std::uint32_t slot) noexcept = 0;

  // Does a bounded part of what is waiting, in the calling thread; any thread, no lock held. False: nothing to do.
  virtual bool help() noexcept { return false; }

  // A descriptor that polls readable when `reap` has something, after arm() answered true; -1 when the queue has none.
  virtual int event_fd() const noexcept { return -1; }
  virtual bool arm() noexcept { return true; }  // false: something is there already
};

Result<std::unique_ptr<Queue>> open_uring(std::uint32_t depth);
Result<std::unique_ptr<Queue>> open_linux_aio(std::uint32_t depth);
Result<std::unique_ptr<Queue>> open_posix_aio(std::uint32_t depth);

// Plain preadv/pwritev on `num_threads` threads, started when first needed. A thread that polls for the result can
// `help` meanwhile, so that it is at least as quick as making the calls itself. `drained` is called by a worker, with
// no lock held, when nothing is waiting any more. Copiers must outlive the queue.
Result<std::unique_ptr<Queue>> open_threads(std::uint32_t depth, unsigned num_threads, std::function<void()> drained);

}  // namespace nixl::core::fileio
