#include "backends/libfabric/sleeper.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

namespace nixl::core::libfabric {

Result<void> Sleeper::open(Engine* engine) {
  engine_ = engine;
  events_ = Fd(epoll_create1(EPOLL_CLOEXEC));
  wake_ = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  timer_ = Fd(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!events_ || !wake_ || !timer_) return fail(errno_error("event descriptors of the LIBFABRIC backend", errno));
  std::vector<int> watched = {wake_.get(), timer_.get()};
  if (engine_)
    for (const int fd : engine_->wait_fds()) watched.push_back(fd);
  for (const int fd : watched) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (epoll_ctl(events_.get(), EPOLL_CTL_ADD, fd, &event) != 0)
      return fail(errno_error("watch an event descriptor of libfabric", errno));
  }
  return {};
}

bool Sleeper::arm() noexcept {
  std::uint64_t drained = 0;
  (void)!read(wake_.get(), &drained, sizeof drained);
  sleeping_.store(true);  // before looking for work: whoever adds some from now on wakes us
  Deadline next = Deadline::never();
  if (news_.exchange(false) || (engine_ && !engine_->arm(next))) {
    sleeping_.store(false);
    return false;
  }
  itimerspec when{};
  if (next.at() != Deadline::never().at()) {
    when.it_value.tv_sec = next.at() / 1'000'000'000;
    when.it_value.tv_nsec = next.at() % 1'000'000'000;
  }
  timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &when, nullptr);
  return true;
}

void Sleeper::wake() noexcept {
  if (!sleeping_.load(std::memory_order_relaxed) || !sleeping_.exchange(false)) return;
  const std::uint64_t one = 1;
  (void)!write(wake_.get(), &one, sizeof one);
}

void Sleeper::note_news() noexcept {
  news_.store(true);
  if (!sleeping_.exchange(false)) return;
  const std::uint64_t one = 1;
  (void)!write(wake_.get(), &one, sizeof one);
}

}  // namespace nixl::core::libfabric
