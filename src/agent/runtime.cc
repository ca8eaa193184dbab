#include "agent/runtime.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>

#include <algorithm>

#include "agent/request.h"
#include "base/log.h"

namespace nixl::core {
namespace {
constexpr Nanoseconds kPollAfterActivity = 100'000;
constexpr Nanoseconds kPollWindow = 50'000;  // in which callers who poll in a loop do so many times
constexpr std::uint32_t kManyPolls = 12;
constexpr int kAsideMs = 1;
// A net, should a backend's library miss a wake-up: that costs this much, not the peer's patience.
constexpr int kMostAsleepMs = 200;
constexpr int kPollIdleBackendMs = 1;  // backends without a descriptor, while something runs
}  // namespace

Result<std::unique_ptr<Runtime>> Runtime::open(Options options) {
  std::unique_ptr<Runtime> runtime(new Runtime(std::move(options)));
  runtime->wake_.reset(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!runtime->wake_) return fail(errno_error("eventfd", errno));
  if (runtime->options_.progress_thread) {
    sigset_t all, before;  // signals are for the program's own threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    runtime->thread_ = std::thread([self = runtime.get()] { self->loop(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(runtime->thread_.native_handle(), "nixl-progress");
  }
  return runtime;
}

Runtime::~Runtime() {
  stop();
}

void Runtime::stop() noexcept {
  stopping_ = true;
  if (wake_) eventfd_write(wake_.get(), 1);
  if (thread_.joinable()) thread_.join();
}

void Runtime::add_slot(Slot& slot) {
  {
    const std::lock_guard lock(grow_mutex_);
    const std::size_t count = num_slots();
    slots_[count] = &slot;
    num_slots_.store(count + 1, std::memory_order_release);
  }
  {
    const std::lock_guard lock(event_mutex_);
    for (const Fd& fd : event_fds_) slot.backend->share_callers_event(fd.get());
  }
  nudge();
}

bool Runtime::drive() {
  bool any = false;
  const std::size_t count = num_slots();
  for (std::size_t i = 0; i < count; ++i) any |= slots_[i]->backend->progress();
  poll_watched();
  handle_lost();
  return any;
}

void Runtime::nudge() noexcept {
  if (asleep_.load(std::memory_order_seq_cst)) eventfd_write(wake_.get(), 1);
}

// A caller who polls in a loop makes all progress: a second spinning thread would only take its core or its locks away.
// The thread looks every millisecond whether that is still so; whoever goes to sleep on it wakes it at once.
void Runtime::stand_aside() {
  aside_ = true;
  for (bool polled = true; polled && !stopping_;) {
    const std::uint32_t before = num_polls_.load(std::memory_order_relaxed);
    pollfd waiting{wake_.get(), POLLIN, 0};
    if (::poll(&waiting, 1, kAsideMs) > 0) break;
    polled = num_polls_.load(std::memory_order_relaxed) - before >= kManyPolls;
  }
  aside_ = false;
}

void Runtime::loop() {
  Nanoseconds active_at = now_ns(), window_at = active_at;
  std::uint32_t polls_before = num_polls_;
  while (!stopping_) {
    if (const Nanoseconds now = now_ns(); now - window_at > kPollWindow) {
      if (num_polls_.load(std::memory_order_relaxed) - polls_before >= kManyPolls) {
        stand_aside();
        active_at = now_ns();
      }
      window_at = now_ns();
      polls_before = num_polls_;
    }
    bool any = drive();
    if (event_fd_used_) any |= fill_inbox();
    const Nanoseconds now = now_ns();
    if (any) active_at = now;
    if (now - active_at < kPollAfterActivity) {
      sched_yield();
      continue;
    }
    asleep_.store(true, std::memory_order_seq_cst);
    bool may_sleep = !stopping_ && !any_lost_;
    bool blind = false;  // a backend that cannot wake us has something to do
    const std::size_t count = num_slots();
    for (std::size_t i = 0; i < count && may_sleep; ++i) {
      Backend& backend = *slots_[i]->backend;
      if (backend.event_fd() < 0)
        blind |= num_watched_ > 0;
      else
        may_sleep = backend.arm();
    }
    const bool woken = may_sleep && sleep(blind ? kPollIdleBackendMs : num_watched_ ? 20 : kMostAsleepMs);
    asleep_ = false;
    if (may_sleep && !blind) {
      window_at = now_ns();
      if (woken) active_at = window_at;
      polls_before = num_polls_;
    }
  }
}

// False: the time ran out.
bool Runtime::sleep(int timeout_ms) {
  std::array<pollfd, kMaxSlots + 1> waits;
  std::size_t num = 0;
  waits[num++] = {wake_.get(), POLLIN, 0};
  const std::size_t count = num_slots();
  for (std::size_t i = 0; i < count; ++i)
    if (const int fd = slots_[i]->backend->event_fd(); fd >= 0) waits[num++] = {fd, POLLIN, 0};
  const int ready = poll(waits.data(), num, timeout_ms);
  eventfd_t ignored;
  if (ready > 0 && waits[0].revents) eventfd_read(wake_.get(), &ignored);
  return ready != 0;
}

void Runtime::enter(std::shared_ptr<Request> request, bool watched) {
  {
    const std::lock_guard lock(requests_mutex_);
    if (watched || event_fd_used_) {
      watched_.push_back(request);
      num_watched_ = watched_.size();
    }
    under_way_.push_back(std::move(request));
  }
  nudge();
}

void Runtime::watch(const std::shared_ptr<Request>& request) {
  {
    const std::lock_guard lock(requests_mutex_);
    const bool runs = std::find(under_way_.begin(), under_way_.end(), request) != under_way_.end();
    if (!runs || std::find(watched_.begin(), watched_.end(), request) != watched_.end()) return;
    watched_.push_back(request);
    num_watched_ = watched_.size();
  }
  nudge();
}

void Runtime::leave(const Request& request) noexcept {
  std::shared_ptr<Request> last, last_watched;  // may be the last owners: destroyed outside the lock
  const std::lock_guard lock(requests_mutex_);
  const auto take = [&](std::vector<std::shared_ptr<Request>>& list, std::shared_ptr<Request>& out) {
    for (auto& held : list)
      if (held.get() == &request) {
        out = std::move(held);
        held = std::move(list.back());
        list.pop_back();
        return;
      }
  };
  take(under_way_, last);
  take(watched_, last_watched);
  num_watched_ = watched_.size();
}

std::vector<std::shared_ptr<Request>> Runtime::under_way() const {
  const std::lock_guard lock(requests_mutex_);
  return under_way_;
}

void Runtime::poll_watched() {
  if (num_watched_ == 0) return;
  std::vector<std::shared_ptr<Request>> list;
  {
    const std::lock_guard lock(requests_mutex_);
    list = watched_;
  }
  for (const auto& request : list) request->poll_if_free();
}

void Runtime::deliver_to_self(std::string message) {
  {
    const std::lock_guard lock(inbox_mutex_);
    inbox_.push_back({nullptr, {options_.agent, std::move(message)}});
  }
  signal_event();
}

bool Runtime::fill_inbox() {
  bool any;
  {
    const std::lock_guard lock(inbox_mutex_);
    any = fill_inbox_locked();
  }
  if (any) signal_event();  // without the lock: whoever it wakes wants it
  return any;
}

bool Runtime::fill_inbox_locked() {
  const std::size_t before = inbox_.size();
  std::vector<Notification> fresh;
  const std::size_t count = num_slots();
  for (std::size_t i = 0; i < count; ++i) {
    if (!slots_[i]->notifier) continue;
    slots_[i]->notifier->drain(fresh);
    for (Notification& item : fresh) inbox_.push_back({slots_[i], std::move(item)});
    fresh.clear();
  }
  return inbox_.size() > before;
}

void Runtime::drain(const std::vector<Slot*>* which, std::vector<Notification>& out) {
  help();
  const auto wanted = [&](Slot* slot) {
    return !which || std::find(which->begin(), which->end(), slot) != which->end();
  };
  std::size_t kept = 0;
  bool fresh;
  {
    const std::lock_guard lock(inbox_mutex_);
    fresh = fill_inbox_locked();
    for (auto& [slot, item] : inbox_) {
      if (wanted(slot))
        out.push_back(std::move(item));
      else
        inbox_[kept++] = {slot, std::move(item)};
    }
    inbox_.resize(kept);
  }
  if (fresh && kept > 0) signal_event();  // what is left may be new, and another caller's
}

void Runtime::terminal() noexcept {
  signal_event();
  if (num_waiters_ > 0) {
    {
      const std::lock_guard lock(event_mutex_);
      ++num_terminal_;
    }
    event_cv_.notify_all();
  }
}

void Runtime::signal_event() noexcept {
  if (!event_fd_used_) return;
  const std::lock_guard lock(event_mutex_);
  for (const Fd& fd : event_fds_) eventfd_write(fd.get(), 1);
}

Result<int> Runtime::event_fd() {
  if (!has_thread())
    return fail(Code::kNotAllowed, "event_fd needs the progress thread: build the agent with enable_prog_thread=True");
  Fd fresh(eventfd(1, EFD_NONBLOCK | EFD_CLOEXEC));  // readable: what happened before is to be looked at
  if (!fresh) return fail(errno_error("eventfd", errno));
  const int number = fresh.get();
  {
    const std::lock_guard lock(event_mutex_);
    event_fds_.push_back(std::move(fresh));
    event_fd_used_ = true;
    const std::size_t count = num_slots();
    for (std::size_t i = 0; i < count; ++i) slots_[i]->backend->share_callers_event(number);
  }
  for (const auto& request : under_way()) watch(request);
  nudge();
  return number;
}

void Runtime::wait_event(std::uint64_t seen, Deadline deadline) {
  if (has_thread()) {
    if (aside_) eventfd_write(wake_.get(), 1);  // it is the thread's turn
    std::unique_lock lock(event_mutex_);
    const auto nap = std::chrono::nanoseconds(std::min<Nanoseconds>(deadline.left(), 50'000'000));
    event_cv_.wait_for(lock, nap, [&] { return num_terminal_ != seen; });
    return;
  }
  if (drive()) return;
  bool may_sleep = true;
  const std::size_t count = num_slots();
  for (std::size_t i = 0; i < count && may_sleep; ++i)
    if (slots_[i]->backend->event_fd() >= 0) may_sleep = slots_[i]->backend->arm();
  if (may_sleep) sleep(deadline.left_ms(kPollIdleBackendMs));
}

void Runtime::note_loss(Options::Loss loss) noexcept {
  {
    const std::lock_guard lock(lost_mutex_);
    lost_.push_back(std::move(loss));
    any_lost_ = true;
  }
  nudge();
}

void Runtime::handle_lost() {
  if (!any_lost_) return;
  std::vector<Options::Loss> lost;
  {
    const std::lock_guard lock(lost_mutex_);
    lost.swap(lost_);
    any_lost_ = false;
  }
  for (const auto& loss : lost) options_.on_lost(loss);
}

}  // namespace nixl::core
