#include "agent/request.h"

#include <sched.h>

#include "agent/telemetry.h"
#include "agent/trace.h"
#include "base/log.h"

namespace nixl::core {
namespace {
constexpr Nanoseconds kSpinBeforeSleep = 50'000;
}

Request::Request(Parts parts, BuiltPlan& built)
    : parts_(std::move(parts)),
      ours_(std::move(built.ours)),
      theirs_(std::move(built.theirs)),
      core_delivers_(parts_.peer->is_self || !parts_.slot->notifier) {
  times_.total_bytes = built.plan.total_bytes;
  times_.num_descs = built.num_descs;
}

Request::~Request() {
  (void)release();
}

Result<std::shared_ptr<Request>> Request::make(Parts parts, BuiltPlan built) {
  built.plan.op = parts.op;
  std::shared_ptr<Request> request(new Request(std::move(parts), built));
  NIXL_TRY(request->check_peer());
  if (!request->acquire())
    return fail(Code::kNotFound, "a region of this request, or agent '%s', was removed meanwhile",
                request->peer()->name.c_str());
  Slot& slot = *request->parts_.slot;
  Result<std::unique_ptr<Transfer>> transfer = [&] {
    const auto lock = slot.setup();
    return slot.backend->prepare(std::move(built.plan));
  }();
  request->give_back();
  if (!transfer) return fail(within(slot.name(), transfer.error()));
  request->transfer_ = std::move(*transfer);
  if (request->parts_.runtime->tracer())
    request->traced_as_ = std::string(request->parts_.op == Op::kWrite ? "WRITE " : "READ ") + request->backend() +
                          (request->parts_.op == Op::kWrite ? " to " : " from ") + request->peer()->name;
  if (!slot.path_told.exchange(true))
    NIXL_INFO("first transfer to agent '%s' by %s: path %s", request->peer()->name.c_str(), slot.name().c_str(),
              request->transfer_->path().c_str());
  return request;
}

Result<void> Request::check_open() const {
  if (released_) return fail(Code::kInvalidArgument, "the transfer handle was released");
  if (!parts_.runtime) return fail(Code::kNotAllowed, "the agent of this transfer handle is gone");
  return {};
}

Result<void> Request::check_peer() const {
  Peer& peer = *parts_.peer;
  switch (peer.state.load(std::memory_order_acquire)) {
    case Peer::State::kAlive:
      return {};
    case Peer::State::kLost:
      if (!peer.told.exchange(true))
        return fail(Code::kPeerLost, "agent '%s' is lost: %s", peer.name.c_str(), peer.why.c_str());
      return fail(Code::kNotFound, "agent '%s' was lost (%s); load its new metadata and make the request again",
                  peer.name.c_str(), peer.why.c_str());
    case Peer::State::kRemoved:
      break;
  }
  return fail(Code::kNotFound, "agent '%s' was removed; load its metadata and make the request again",
              peer.name.c_str());
}

// Everything the plan points to stays alive until give_back().
bool Request::acquire() {
  if (!parts_.link->usage.acquire()) return false;
  std::size_t num_ours = 0, num_theirs = 0;
  while (num_ours < ours_.size() && ours_[num_ours]->usage.acquire()) ++num_ours;
  if (num_ours == ours_.size())
    while (num_theirs < theirs_.size() && theirs_[num_theirs]->usage.acquire()) ++num_theirs;
  if (num_ours == ours_.size() && num_theirs == theirs_.size()) return true;
  while (num_theirs) parts_.slot->release(*theirs_[--num_theirs]);
  while (num_ours) parts_.slot->release(*ours_[--num_ours]);
  parts_.link->release();
  return false;
}

void Request::give_back() {
  for (const auto& entry : theirs_) parts_.slot->release(*entry);
  for (const auto& entry : ours_) parts_.slot->release(*entry);
  parts_.link->release();
}

Result<Runtime*> Request::runtime() {
  const std::lock_guard lock(mutex_);
  NIXL_TRY(check_open());
  return parts_.runtime;
}

Result<bool> Request::post(std::optional<std::string_view> message) {
  std::unique_lock lock(mutex_);
  NIXL_TRY(check_open());
  if (parts_.runtime->any_lost()) {
    Runtime* const owner = parts_.runtime;
    lock.unlock();
    owner->handle_lost();
    lock.lock();
    NIXL_TRY(check_open());
  }
  if (under_way()) poll();
  if (under_way()) return fail(Code::kBusy, "the transfer to agent '%s' is still running", peer()->name.c_str());
  NIXL_TRY(check_peer());
  if (!acquire())
    return fail(Code::kNotFound,
                "a region of this request was deregistered here, or by agent '%s'; make the request again",
                peer()->name.c_str());
  if (message) parts_.message = std::string(*message);
  started_ns_ = now_ns();
  times_.start_us = started_ns_ / 1000;
  times_.post_us = times_.transfer_us = 0;
  if (Tracer* const tracer = parts_.runtime->tracer()) range_ = tracer->start(traced_as_.c_str(), times_.total_bytes);
  submit();
  // What ended inside this call was timed by finish().
  if (times_.transfer_us == 0) times_.transfer_us = std::max<std::int64_t>(1, (now_ns() - started_ns_) / 1000);
  times_.post_us = times_.transfer_us;
  if (state_ == State::kDone && parts_.runtime->telemetry())
    parts_.runtime->telemetry()->transfer_done(parts_.op, times_);
  return outcome();
}

void Request::submit() {
  const bool was_queued = state_ == State::kQueued;
  state_ = State::kRunning;
  const bool attach = parts_.message && !core_delivers_;
  const auto state = transfer_->submit(attach ? std::optional<std::string_view>(*parts_.message) : std::nullopt);
  if (!state && state.error().code == Code::kAgain)
    state_ = State::kQueued;
  else if (!state)
    return finish(state.error());
  else if (*state == TransferState::kDone)
    return finish(std::nullopt);
  if (was_queued) return;
  entered_ = true;
  const bool by_itself = state_ == State::kQueued || (parts_.message && core_delivers_);
  parts_.runtime->enter(shared_from_this(), by_itself);
}

void Request::poll() {
  if (state_ == State::kQueued) return submit();
  const auto state = transfer_->poll();
  if (!state)
    finish(state.error());
  else if (*state == TransferState::kDone)
    finish(std::nullopt);
}

void Request::finish(std::optional<Error> error) {
  const bool inline_end = !entered_;
  if (!error && parts_.message && core_delivers_) {
    if (peer()->is_self)
      parts_.runtime->deliver_to_self(*parts_.message);
    else if (auto sent = parts_.send_message(*parts_.peer, *parts_.message); !sent)
      error = within("data arrived, its notification did not leave", sent.error());
  }
  times_.transfer_us = std::max<std::int64_t>({1, times_.post_us, (now_ns() - started_ns_) / 1000});
  state_ = error ? State::kFailed : State::kDone;
  if (const std::uint64_t range = std::exchange(range_, 0)) parts_.runtime->tracer()->end(range);
  Telemetry* telemetry = parts_.runtime->telemetry();
  if (telemetry && error) telemetry->failed(error->code);
  if (telemetry && !error && !inline_end)
    telemetry->transfer_done(parts_.op, times_);  // post() does it for inline ends
  if (error) {
    if (error->code == Code::kPeerLost) {
      parts_.peer->told = true;
      if (!parts_.peer->is_self) parts_.peer->end(Peer::State::kLost, error->reason);
      parts_.runtime->peer_lost({parts_.peer->name, parts_.peer->incarnation}, *error);
    }
    error_ = std::move(*error);
  }
  give_back();
  if (entered_) parts_.runtime->leave(*this);
  entered_ = false;
  parts_.runtime->terminal();
}

Result<bool> Request::outcome() const {
  switch (state_) {
    case State::kCreated:
      return fail(Code::kNotPosted, "the transfer was never posted");
    case State::kQueued:
    case State::kRunning:
      return false;
    case State::kDone:
      return true;
    case State::kFailed:
      break;
  }
  return fail(error_);
}

Result<bool> Request::check() {
  Runtime* runtime = nullptr;
  {
    const std::lock_guard lock(mutex_);
    NIXL_TRY(check_open());
    if (!under_way()) return outcome();
    runtime = parts_.runtime;
    poll();
    if (!under_way()) return outcome();
  }
  runtime->help();
  const std::lock_guard lock(mutex_);
  NIXL_TRY(check_open());
  return outcome();
}

Result<bool> Request::wait(Deadline deadline) {
  NIXL_ASSIGN(Runtime* const runtime, this->runtime());
  const Deadline spin = Deadline::after(kSpinBeforeSleep).earlier(deadline);
  for (;;) {
    NIXL_ASSIGN(const bool done, check());
    if (done) return true;
    if (spin.passed()) break;
    sched_yield();
  }
  const Runtime::Waiter waiter(*runtime);
  runtime->watch(shared_from_this());
  for (;;) {
    const std::uint64_t seen = runtime->events_seen();
    NIXL_ASSIGN(const bool done, check());
    if (done || deadline.passed()) return done;
    runtime->wait_event(seen, deadline);
  }
}

bool Request::try_stop(const Error& why) {
  if (!under_way()) return true;
  if (state_ == State::kRunning) poll();
  const Deadline deadline = Deadline::after(kStopTime);
  while (state_ == State::kRunning && !transfer_->cancel()) {
    if (deadline.passed()) return false;
    parts_.slot->backend->progress();
    sched_yield();
  }
  if (under_way()) finish(why);
  return true;
}

Result<void> Request::cancel() {
  const std::lock_guard lock(mutex_);
  NIXL_TRY(check_open());
  if (state_ == State::kCreated) return fail(Code::kNotPosted, "the transfer was never posted");
  if (!try_stop({Code::kCancelled, "cancelled by the caller"}))
    return fail(Code::kBusy, "the transfer by %s has I/O in flight that cannot be stopped yet",
                parts_.slot->name().c_str());
  return {};
}

Result<void> Request::release() {
  std::unique_ptr<Transfer> gone;
  const std::lock_guard lock(mutex_);
  if (released_ || !parts_.runtime || !transfer_) {
    released_ = true;
    return {};
  }
  if (!try_stop({Code::kCancelled, "the handle was released"}))
    return fail(Code::kBusy,
                "the transfer by %s has I/O in flight that cannot be stopped yet; poll it to the end, then release",
                parts_.slot->name().c_str());
  released_ = true;
  gone = std::move(transfer_);
  return {};
}

void Request::stop(const Error& why) {
  const std::lock_guard lock(mutex_);
  if (parts_.runtime) (void)try_stop(why);
}

bool Request::close() {
  const std::lock_guard lock(mutex_);
  if (!parts_.runtime) return true;
  const bool stopped = try_stop({Code::kCancelled, "the agent was destroyed"});
  if (stopped)
    transfer_.reset();
  else
    (void)transfer_.release();  // its memory may still be written: leaked rather than freed
  parts_.runtime = nullptr;
  return stopped;
}

void Request::poll_if_free() {
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (lock && parts_.runtime && under_way()) poll();
}

Result<std::string> Request::path() {
  const std::lock_guard lock(mutex_);
  NIXL_TRY(check_open());
  return transfer_->path();
}

Result<CostEstimate> Request::estimate() {
  const std::lock_guard lock(mutex_);
  NIXL_TRY(check_open());
  CostModel* model = parts_.slot->backend->cost_model();
  if (!model) return fail(Code::kUnsupported, "backend %s has no cost model", parts_.slot->name().c_str());
  return model->estimate(*transfer_);
}

Result<TransferTimes> Request::times() {
  const std::lock_guard lock(mutex_);
  NIXL_TRY(check_open());
  if (state_ == State::kCreated) return fail(Code::kNotPosted, "the transfer was never posted");
  TransferTimes times = times_;
  if (under_way()) times.transfer_us = std::max(times.post_us, (now_ns() - started_ns_) / 1000);
  return times;
}

}  // namespace nixl::core
