#include "backends/network/sleeper.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

namespace nixl::core::network {

Result<void> Sleeper::open(const char* backend, std::vector<int> watched) {
  events_ = Fd(epoll_create1(EPOLL_CLOEXEC));
  wake_ = Fd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  timer_ = Fd(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!events_ || !wake_ || !timer_)
    return fail(errno_error(std::string("event descriptors of the ") + backend + " backend", errno));
  watched.insert(watched.end(), {wake_.get(), timer_.get()});
  for (const int fd : watched) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (epoll_ctl(events_.get(), EPOLL_CTL_ADD, fd, &event) != 0)
      return fail(errno_error(std::string("watch an event descriptor of ") + backend, errno));
  }
  return {};
}

void Sleeper::begin() noexcept {
  std::uint64_t drained = 0;
  (void)!read(wake_.get(), &drained, sizeof drained);
  sleeping_.store(true);  // before looking for work: whoever adds some from now on wakes us
}

void Sleeper::set_timer(Deadline next) noexcept {
  itimerspec when{};
  if (next.at() != Deadline::never().at()) {
    when.it_value.tv_sec = next.at() / 1'000'000'000;
    when.it_value.tv_nsec = next.at() % 1'000'000'000;
  }
  timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &when, nullptr);
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

}  // namespace nixl::core::network
