// The queue of plain calls on a few threads: the quickest way through the page cache, where the asynchronous interfaces
// either block in submit (Linux AIO) or hand every call to a kernel thread (io_uring).
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/fd.h"
#include "fileio/plain_call.h"
#include "fileio/queue.h"

namespace nixl::core::fileio {
namespace {

constexpr std::size_t kBatchBytes = 512 << 10;  // taken from the queue at once
constexpr std::size_t kBatchIos = 64;
constexpr std::size_t kHelpIos = 8;
// A helper whose write took this long hit the kernel's throttling of dirty pages; helpers then leave writes to the
// workers.
constexpr Nanoseconds kSlowHelp = 2'000'000;
constexpr Nanoseconds kHelpPause = 100'000'000;

std::size_t bytes_of(const Io& io) {
  std::size_t sum = 0;
  for (std::uint32_t i = 0; i < io.num_iov; ++i) sum += io.iov[i].iov_len;
  return sum;
}

// The bounce buffers of one worker, one for each copier it has met.
class Bounce {
 public:
  ~Bounce() {
    for (const auto& [copier, buffer] : buffers_) copier->free(buffer, kMaxCopyBytes);
  }
  std::int64_t run(const Io& io) {
    void*& buffer = buffers_[io.copier];
    if (!buffer) buffer = io.copier->allocate(kMaxCopyBytes);
    if (!buffer) {
      buffers_.erase(io.copier);
      return -ENOMEM;
    }
    iovec host = {buffer, std::min(io.iov->iov_len, kMaxCopyBytes)};
    Io copy = io;
    copy.iov = &host;
    if (io.write && !io.copier->to_host(buffer, io.iov->iov_base, host.iov_len)) return kCopyFailed;
    const std::int64_t got = plain_call(copy, 0);
    if (!io.write && got > 0 && !io.copier->from_host(io.iov->iov_base, buffer, static_cast<std::size_t>(got)))
      return kCopyFailed;
    return got;
  }

 private:
  std::map<Copier*, void*> buffers_;
};

class ThreadQueue final : public Queue {
 public:
  ThreadQueue(std::uint32_t depth, unsigned num_threads, Fd event, std::function<void()> drained)
      : depth_(depth), num_threads_(num_threads), owner_(::getpid()), state_(new State), drained_(std::move(drained)) {
    state_->event = std::move(event);
  }
  ~ThreadQueue() override {
    if (::getpid() !=
        owner_) {  // after a fork the threads do not exist and the lock may be held for ever: leave it all
      for (std::thread& thread : threads_) thread.detach();
      (void)state_.release();
      return;
    }
    {
      std::lock_guard lock(state_->mutex);
      state_->stop = true;
    }
    state_->wake.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  std::string_view name() const noexcept override { return "threads"; }
  std::uint32_t depth() const noexcept override { return depth_; }
  std::uint32_t max_iov() const noexcept override { return 1024; }
  bool copies() const noexcept override { return true; }

  Result<std::size_t> submit(std::span<const Io> batch) override {
    if (threads_.size() < num_threads_ && !batch.empty()) {
      sigset_t all, before;  // signals are the program's own threads' business
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      int error = 0;
      try {
        threads_.emplace_back([this] { work(); });
        ++num_running_;
      } catch (const std::system_error& e) {
        error = e.code().value();
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      if (threads_.empty()) return fail(errno_error("start an I/O thread", error));
    }
    std::lock_guard lock(state_->mutex);
    for (const Io& io : batch) state_->waiting.push_back(io);
    for (std::size_t n = std::min<std::size_t>(state_->idle, batch.size()); n-- > 0;) state_->wake.notify_one();
    return batch.size();
  }

  std::size_t reap(std::span<Done> out) override {
    std::lock_guard lock(state_->mutex);
    auto& done = state_->done;
    const std::size_t count = std::min(out.size(), done.size());
    std::copy_n(done.end() - static_cast<std::ptrdiff_t>(count), count, out.begin());
    done.resize(done.size() - count);
    return count;
  }

  void cancel(std::uint32_t slot) noexcept override {
    std::lock_guard lock(state_->mutex);
    auto& waiting = state_->waiting;
    const auto at = std::find_if(waiting.begin(), waiting.end(), [&](const Io& io) { return io.slot == slot; });
    if (at == waiting.end()) return;
    waiting.erase(at);
    finish_locked({{slot, -ECANCELED}});
  }

  bool help() noexcept override {
    std::vector<Io> batch;
    {
      std::lock_guard lock(state_->mutex);
      take_locked(batch, /*helping=*/true);
    }
    if (batch.empty()) return false;
    std::vector<Done> done;
    std::vector<Io> cold;
    const Nanoseconds begin = now_ns();
    for (const Io& io : batch) {
      const std::int64_t got = plain_call(io, io.write ? 0 : RWF_NOWAIT);
      if (got == -EOPNOTSUPP && !io.write) blocking_fd_ = io.fd;
      if (!io.write && (got == -EAGAIN || got == -EOPNOTSUPP))
        cold.push_back(io);
      else
        done.push_back({io.slot, got});
    }
    if (now_ns() - begin > kSlowHelp) no_writes_until_ = now_ns() + kHelpPause;
    std::lock_guard lock(state_->mutex);
    for (const Io& io : cold) state_->waiting.push_front(io);
    if (!cold.empty()) {
      state_->cold = cold.size();
      state_->wake.notify_one();
    }
    finish_locked(done);
    return true;
  }

  int event_fd() const noexcept override { return state_->event.get(); }
  bool arm() noexcept override {
    std::lock_guard lock(state_->mutex);
    std::uint64_t count = 0;
    (void)!::read(state_->event.get(), &count, sizeof count);
    state_->armed = state_->done.empty();
    return state_->armed;
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable wake;
    std::deque<Io> waiting;
    std::vector<Done> done;
    Fd event;
    std::size_t idle = 0;
    std::size_t cold = 0;  // so many at the front are not in the page cache: not for helpers
    bool armed = false, stop = false;
  };

  void take_locked(std::vector<Io>& batch, bool helping) {
    auto& waiting = state_->waiting;
    const std::size_t most = helping ? kHelpIos : kBatchIos;
    const std::size_t share = waiting.size() / (num_running_ + 1) + 1;  // leave some for the others
    std::size_t bytes = 0;
    while (!waiting.empty() && batch.size() < std::min(most, share) && bytes < kBatchBytes) {
      const Io& io = waiting.front();
      if (helping && (state_->cold > 0 || !helper_may_run(io))) return;
      if (state_->cold > 0) --state_->cold;
      bytes += bytes_of(io);
      batch.push_back(io);
      waiting.pop_front();
    }
  }
  bool helper_may_run(const Io& io) const {
    if (io.copier) return false;
    return io.write ? now_ns() >= no_writes_until_ : io.fd != blocking_fd_;
  }
  void finish_locked(const std::vector<Done>& done) {
    state_->done.insert(state_->done.end(), done.begin(), done.end());
    if (state_->armed && !done.empty()) {
      state_->armed = false;
      const std::uint64_t one = 1;
      (void)!::write(state_->event.get(), &one, sizeof one);
    }
  }

  void work() {
    Bounce bounce;
    std::vector<Io> batch;
    std::vector<Done> done;
    std::unique_lock lock(state_->mutex);
    for (;;) {
      ++state_->idle;
      state_->wake.wait(lock, [&] { return state_->stop || !state_->waiting.empty(); });
      --state_->idle;
      if (state_->waiting.empty()) return;  // stop, and nothing left to do
      batch.clear();
      take_locked(batch, /*helping=*/false);
      lock.unlock();
      done.clear();
      for (const Io& io : batch) done.push_back({io.slot, io.copier ? bounce.run(io) : plain_call(io, 0)});
      lock.lock();
      finish_locked(done);
      const bool drained = state_->waiting.empty() && !state_->stop;
      if (drained && drained_) {
        lock.unlock();
        drained_();
        lock.lock();
      }
    }
  }

  std::uint32_t depth_;
  unsigned num_threads_;
  pid_t owner_;
  std::unique_ptr<State> state_;
  std::function<void()> drained_;
  std::atomic<Nanoseconds> no_writes_until_{0};
  std::atomic<int> blocking_fd_{-1};  // the last file seen that cannot tell whether a read would block: not for helpers
  std::atomic<std::size_t> num_running_{0};
  std::vector<std::thread> threads_;
};

}  // namespace

Result<std::unique_ptr<Queue>> open_threads(std::uint32_t depth, unsigned num_threads, std::function<void()> drained) {
  Fd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event) return fail(errno_error("eventfd", errno));
  return std::make_unique<ThreadQueue>(depth, num_threads, std::move(event), std::move(drained));
}

}  // namespace nixl::core::fileio
