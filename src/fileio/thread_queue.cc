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
constexpr std::size_t kLookAhead = 128;  // places searched for something that may start
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
    iovec host = {buffer, bytes_of(io)};
    Io copy = io;
    copy.iov = &host;
    copy.num_iov = 1;
    const std::span memory(io.iov, io.num_iov);
    if (io.write && !io.copier->to_host(buffer, memory)) return kCopyFailed;
    const std::int64_t got = plain_call(copy, 0);
    if (!io.write && got > 0 && !io.copier->from_host(memory, buffer, static_cast<std::size_t>(got)))
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
    for (const Io& io : batch) state_->waiting.push_back({io, false});
    num_waiting_ = state_->waiting.size();
    for (std::size_t n = std::min<std::size_t>(state_->idle, batch.size()); n-- > 0;) state_->wake.notify_one();
    return batch.size();
  }

  std::size_t reap(std::span<Done> out) override {
    if (!has_done_.load(std::memory_order_acquire)) return 0;  // a poller in a loop must not hold up the workers
    std::lock_guard lock(state_->mutex);
    auto& done = state_->done;
    const std::size_t count = std::min(out.size(), done.size());
    std::copy_n(done.end() - static_cast<std::ptrdiff_t>(count), count, out.begin());
    done.resize(done.size() - count);
    has_done_ = !done.empty();
    return count;
  }

  void cancel(std::uint32_t slot) noexcept override {
    std::lock_guard lock(state_->mutex);
    auto& waiting = state_->waiting;
    const auto at =
        std::find_if(waiting.begin(), waiting.end(), [&](const Waiting& one) { return one.io.slot == slot; });
    if (at == waiting.end()) return;
    waiting.erase(at);
    const Done cancelled = {slot, -ECANCELED};
    finish_locked({&cancelled, 1});
  }

  bool help() noexcept override {
    if (num_waiting_.load(std::memory_order_relaxed) == 0) return false;
    Batch batch;
    {
      std::lock_guard lock(state_->mutex);
      take_locked(batch, /*helping=*/true);
    }
    if (batch.count == 0) return false;
    Io cold[kHelpIos];
    std::size_t num_cold = 0;
    const Nanoseconds begin = now_ns();
    for (std::size_t i = 0; i < batch.count; ++i) {
      const Io& io = batch.ios[i];
      const std::int64_t got = plain_call(io, io.write ? 0 : RWF_NOWAIT);
      if (got == -EOPNOTSUPP && !io.write) blocking_fd_ = io.fd;
      if (!io.write && (got == -EAGAIN || got == -EOPNOTSUPP))
        cold[num_cold++] = io;
      else
        batch.done[batch.num_done++] = {io.slot, got};
    }
    if (now_ns() - begin > kSlowHelp) no_writes_until_ = now_ns() + kHelpPause;
    std::lock_guard lock(state_->mutex);
    while (num_cold > 0) state_->waiting.push_front({cold[--num_cold], true});
    give_back_locked(batch);
    if (state_->idle > 0 && first_eligible_locked(false) != state_->waiting.end()) state_->wake.notify_one();
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
  struct Waiting {
    Io io;
    bool cold = false;  // not in the page cache: not for helpers
  };
  struct State {
    std::mutex mutex;
    std::condition_variable wake;
    std::deque<Waiting> waiting;
    std::vector<Done> done;
    std::vector<int> written;  // descriptors that somebody is writing to
    Fd event;
    std::size_t idle = 0;
    bool armed = false, stop = false;
  };
  struct Batch {
    Io ios[kBatchIos];
    Done done[kBatchIos];
    std::size_t count = 0, num_done = 0;
    int written = -1;
  };

  // The kernel lets one write at a time into a file; a second thread would only wait for it, at the price of two
  // switches a call. So a file being written is left to the one who writes it.
  bool eligible(const Waiting& one, bool helping) const {
    const Io& io = one.io;
    if (helping && (one.cold || io.copier)) return false;
    if (helping && (io.write ? now_ns() < no_writes_until_ : io.fd == blocking_fd_)) return false;
    const auto& written = state_->written;
    // Copies through a buffer go on while another one is written: that is the pipeline.
    return !io.write || io.copier || std::find(written.begin(), written.end(), io.fd) == written.end();
  }
  std::deque<Waiting>::iterator first_eligible_locked(bool helping) {
    auto& waiting = state_->waiting;
    const auto limit = waiting.begin() + static_cast<std::ptrdiff_t>(std::min(waiting.size(), kLookAhead));
    const auto at = std::find_if(waiting.begin(), limit, [&](const Waiting& one) { return eligible(one, helping); });
    return at == limit ? waiting.end() : at;
  }
  void take_locked(Batch& batch, bool helping) {
    batch.count = batch.num_done = 0;
    batch.written = -1;
    auto& waiting = state_->waiting;
    const auto first = first_eligible_locked(helping);
    if (first == waiting.end()) return;
    const Io like = first->io;
    const std::size_t share = waiting.size() / (num_running_ + 1) + 1;  // of reads, some are left for the others
    const bool alone = like.write && !like.copier;  // writes of a file in place: one thread at a time
    const std::size_t most = helping ? kHelpIos : alone ? kBatchIos : std::min(kBatchIos, share);
    std::size_t bytes = 0;
    auto at = first;
    for (; at != waiting.end() && batch.count < most && bytes < kBatchBytes; ++at) {
      if (at->io.write != like.write || at->io.copier != like.copier || (like.write && at->io.fd != like.fd) ||
          !eligible(*at, helping))
        break;
      bytes += bytes_of(at->io);
      batch.ios[batch.count++] = at->io;
    }
    waiting.erase(first, at);
    num_waiting_ = waiting.size();
    if (alone) state_->written.push_back(batch.written = like.fd);
  }
  void give_back_locked(const Batch& batch) {
    if (batch.written >= 0) {
      auto& written = state_->written;
      written.erase(std::find(written.begin(), written.end(), batch.written));
    }
    finish_locked({batch.done, batch.num_done});
  }
  void finish_locked(std::span<const Done> done) {
    num_waiting_ = state_->waiting.size();
    if (done.empty()) return;
    state_->done.insert(state_->done.end(), done.begin(), done.end());
    has_done_.store(true, std::memory_order_release);
    if (state_->armed) {
      state_->armed = false;
      const std::uint64_t one = 1;
      (void)!::write(state_->event.get(), &one, sizeof one);
    }
  }

  void work() {
    Bounce bounce;
    Batch batch;
    std::unique_lock lock(state_->mutex);
    for (;;) {
      ++state_->idle;
      state_->wake.wait(lock, [&] {
        return first_eligible_locked(false) != state_->waiting.end() || (state_->stop && state_->waiting.empty());
      });
      --state_->idle;
      if (state_->waiting.empty()) return;  // stop, and nothing left to do
      take_locked(batch, /*helping=*/false);
      lock.unlock();
      for (std::size_t i = 0; i < batch.count; ++i) {
        const Io& io = batch.ios[i];
        batch.done[batch.num_done++] = {io.slot, io.copier ? bounce.run(io) : plain_call(io, 0)};
      }
      lock.lock();
      give_back_locked(batch);
      if (state_->stop) state_->wake.notify_all();
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
  std::atomic<std::size_t> num_running_{0}, num_waiting_{0};
  std::atomic<bool> has_done_{false};
  std::vector<std::thread> threads_;
};

}  // namespace

Result<std::unique_ptr<Queue>> open_threads(std::uint32_t depth, unsigned num_threads, std::function<void()> drained) {
  Fd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event) return fail(errno_error("eventfd", errno));
  return std::make_unique<ThreadQueue>(depth, num_threads, std::move(event), std::move(drained));
}

}  // namespace nixl::core::fileio
