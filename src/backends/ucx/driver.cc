#include "backends/ucx/driver.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>

namespace nixl::core::ucx {
namespace {
constexpr Nanoseconds kPollAfterActivity = 100'000;
constexpr int kMostAsleepMs = 200;  // as the agent's own thread
}  // namespace

Result<std::unique_ptr<Driver>> Driver::start(Worker& worker) {
  std::unique_ptr<Driver> driver(new Driver(worker));
  driver->wake_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!driver->wake_) return fail(errno_error("eventfd of a UCX thread", errno));
  sigset_t all, before;  // signals are for the program's own threads
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  driver->thread_ = std::thread([self = driver.get()] { self->loop(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::pthread_setname_np(driver->thread_.native_handle(), "nixl-ucx");
  return driver;
}

Driver::~Driver() {
  stopping_ = true;
  if (wake_) ::eventfd_write(wake_.get(), 1);
  if (thread_.joinable()) thread_.join();
}

void Driver::wake() noexcept {
  if (asleep_.exchange(false)) ::eventfd_write(wake_.get(), 1);
}

void Driver::loop() {
  Nanoseconds active_at = now_ns();
  while (!stopping_) {
    if (worker_.progress()) active_at = now_ns();
    if (now_ns() - active_at < kPollAfterActivity) {
      ::sched_yield();
      continue;
    }
    asleep_ = true;  // before looking for work: whoever adds some from now on wakes us
    Deadline next = Deadline::never();
    if (worker_.arm(next) && !stopping_) {
      pollfd waits[] = {{wake_.get(), POLLIN, 0}, {worker_.event_fd(), POLLIN, 0}};
      if (::poll(waits, 2, next.left_ms(kMostAsleepMs)) > 0) active_at = now_ns();
      eventfd_t ignored;
      if (waits[0].revents) ::eventfd_read(wake_.get(), &ignored);
    }
    asleep_ = false;
  }
}

}  // namespace nixl::core::ucx
