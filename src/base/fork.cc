#include "base/fork.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

namespace nixl::core {
namespace {

std::atomic<int> g_forks{0};

// Never destroyed: handlers run and objects go until the process ends.
struct Descriptors {
  std::mutex mutex;
  std::vector<int> open;
};
Descriptors& descriptors() {
  static auto& all = *new Descriptors;
  return all;
}

void watch_forks() {
  static const bool watching = [] {
    (void)descriptors();
    pthread_atfork([] { descriptors().mutex.lock(); }, [] { descriptors().mutex.unlock(); },
                   [] {
                     for (const int fd : descriptors().open) ::close(fd);
                     descriptors().open.clear();
                     ++g_forks;
                     descriptors().mutex.unlock();
                   });
    return true;
  }();
  (void)watching;
}

}  // namespace

int Birthplace::forks() noexcept {
  watch_forks();
  return g_forks.load(std::memory_order_relaxed);
}

ClosedInChildren::ClosedInChildren(int fd) : fd_(fd) {
  if (fd < 0) return;
  watch_forks();
  const std::lock_guard lock(descriptors().mutex);
  descriptors().open.push_back(fd);
}

ClosedInChildren::~ClosedInChildren() {
  if (fd_ < 0) return;
  const std::lock_guard lock(descriptors().mutex);
  auto& open = descriptors().open;
  if (const auto found = std::find(open.begin(), open.end(), fd_); found != open.end()) {
    *found = open.back();
    open.pop_back();
  }
}

}  // namespace nixl::core
