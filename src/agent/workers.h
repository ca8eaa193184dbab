// A few threads that run queued jobs; they come with the jobs and sleep when there are none.
#pragma once
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace nixl::core {

class Workers {
 public:
  explicit Workers(std::size_t most) : most_(most) {}
  ~Workers() { stop(); }

  void run(std::function<void()> job) {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    jobs_.push_back(std::move(job));
    if (idle_ >= jobs_.size()) {
      ready_.notify_one();
    } else if (threads_.size() < most_) {
      threads_.emplace_back([this] { work(); });
    }
  }
  // Jobs not begun are dropped; those under way are waited for (they look at stopping()).
  void stop() noexcept {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      jobs_.clear();
    }
    ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  bool stopping() const {
    const std::lock_guard lock(mutex_);
    return stopping_;
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      ++idle_;
      ready_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      --idle_;
      if (stopping_) return;
      auto job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
      job = nullptr;
      lock.lock();
    }
  }
  const std::size_t most_;
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<std::function<void()>> jobs_;
  std::vector<std::thread> threads_;
  std::size_t idle_ = 0;
  bool stopping_ = false;
};

}  // namespace nixl::core
