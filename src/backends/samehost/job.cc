#include "backends/samehost/job.h"

#include <algorithm>

namespace nixl::core::samehost {
namespace {

thread_local unsigned own_index = CopyThreads::kMost;

}  // namespace

void Job::start() {
  {
    std::lock_guard lock(mutex_);
    error_.reset();
    ending_ = false;
  }
  failed_.store(false, std::memory_order_relaxed);
  finished_.store(false, std::memory_order_relaxed);
  pending_.store(num_chunks_, std::memory_order_relaxed);
  // A copy thread that still holds this job from the submission before may take chunks of the new one from here on.
  next_.store(0, std::memory_order_release);
}

bool Job::run_one() {
  if (next_.load(std::memory_order_relaxed) >= num_chunks_) return false;
  const std::uint32_t index = next_.fetch_add(1, std::memory_order_acq_rel);
  if (index >= num_chunks_) return false;
  if (!failed_.load(std::memory_order_relaxed))
    if (auto copied = copy_chunk(index); !copied) note(std::move(copied).error());
  if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) end();
  return true;
}

void Job::end() {
  bool good;
  {
    std::lock_guard lock(mutex_);
    ending_ = true;  // too late to abandon from here on
    good = !error_;
  }
  if (good) {
    if (auto done = complete(); !done) error_ = std::move(done).error();
  }
  finished_.store(true, std::memory_order_release);
  announce();
}

void Job::abandon(Error why) noexcept {
  note(std::move(why));
  while (run_one()) {
  }
}

void Job::note(Error why) noexcept {
  std::lock_guard lock(mutex_);
  if (ending_) return;
  if (!error_) error_ = std::move(why);
  failed_.store(true, std::memory_order_release);
}

std::shared_ptr<CopyThreads> CopyThreads::shared() {
  static std::mutex mutex;
  static std::weak_ptr<CopyThreads> current;
  std::lock_guard lock(mutex);
  auto threads = current.lock();
  if (!threads) {
    threads.reset(new CopyThreads(count()));
    current = threads;
  }
  return threads;
}

unsigned CopyThreads::count() noexcept {
  static const unsigned count = std::clamp(std::thread::hardware_concurrency(), 1u, kMost);
  return count;
}

unsigned CopyThreads::index() noexcept {
  return own_index;
}

CopyThreads::CopyThreads(unsigned count) {
  for (unsigned i = 0; i < count; ++i) threads_.emplace_back([this, i] { work(i); });
}

CopyThreads::~CopyThreads() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void CopyThreads::add(std::shared_ptr<Work> work, bool waiter) {
  const std::size_t count = std::max<std::size_t>(threads_.size() - waiter, 1);
  {
    std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < count; ++i) queue_.push_back(work);
  }
  for (std::size_t i = 0; i < count; ++i) wake_.notify_one();
}

void CopyThreads::work(unsigned index) {
  own_index = index;
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stop_ || !queue_.empty(); });
    if (stop_) return;
    auto next = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    const bool more = next->work();
    lock.lock();
    // To the back after every chunk, so that all work shares the threads evenly.
    if (more) queue_.push_back(std::move(next));
  }
}

}  // namespace nixl::core::samehost
