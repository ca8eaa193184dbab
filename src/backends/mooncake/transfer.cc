#include "backends/mooncake/transfer.h"

#include <algorithm>

namespace nixl::core::mooncake {
namespace {

constexpr Nanoseconds kVerdictTime = 100'000'000;  // for the end of a peer to show after a failed request
// For the engine to end what it has under way to a peer that is gone.
constexpr Nanoseconds kLettingGo = 5'000'000'000;

}  // namespace

MooncakeTransfer::MooncakeTransfer(MooncakeBackend& backend, Plan plan)
    : backend_(&backend),
      line_(static_cast<Line*>(plan.peer)),
      plan_(std::move(plan)),
      path_("mooncake/" + backend.options_.protocol),
      cursor_(plan_) {
  for (const LocalRegion* region : plan_.local_regions)
    local_cuts_.push_back(&static_cast<const OwnRegion*>(region)->cuts);
  for (const RemoteRegion* region : plan_.remote_regions)
    remote_cuts_.push_back(&static_cast<const PeerRegion*>(region)->cuts);
  requests_.resize(std::min<std::uint64_t>(std::max<std::uint64_t>(plan_.num_blocks, 1), kMaxBatch));
  batches_.reserve(Line::kMaxRequests / kMaxBatch + 1);
}

Result<TransferState> MooncakeTransfer::submit(std::optional<std::string_view> message) {
  const std::lock_guard lock(backend_->mutex_);
  NIXL_ASSIGN(const auto segment, line_->segment());
  if (!segment) return fail(Code::kAgain, "agent '%s' is still being called", line_->peer().name.c_str());
  cursor_ = PlanCursor(plan_);
  rest_ = {};
  error_.reset();
  failed_at_ = 0;
  stopping_ = false;
  message_ = message ? std::optional<std::string>(*message) : std::nullopt;
  running_ = true;
  backend_->running_.push_back(this);
  advance_locked();
  return answer();
}

Result<TransferState> MooncakeTransfer::poll() {
  const std::lock_guard lock(backend_->mutex_);
  if (running_) advance_locked();
  if (running_ && batches_.empty()) backend_->advance_all_locked();  // what others have under way may leave it no room
  return answer();
}

Result<TransferState> MooncakeTransfer::answer() const {
  if (running_) return TransferState::kRunning;
  if (error_) return fail(*error_);
  return TransferState::kDone;
}

bool MooncakeTransfer::cancel() noexcept {
  const std::lock_guard lock(backend_->mutex_);
  stopping_ = true;
  if (running_) advance_locked();
  return !running_;
}

bool MooncakeTransfer::advance_locked() {
  const bool reaped = reap_locked();
  const bool fed = feed_locked();
  settle_locked();
  return reaped || fed || !running_;
}

bool MooncakeTransfer::reap_locked() {
  bool any = false;
  for (Batch& batch : batches_) {
    std::string why;
    while (batch.next < batch.count) {
      const TaskState state = backend_->engine_->poll(batch.id, batch.next, why);
      if (state == TaskState::kRunning) break;
      if (state == TaskState::kFailed && !error_)
        error_ = Error{Code::kIo, "Mooncake transfer with agent '" + line_->peer().name + "': " + why};
      ++batch.next;
      any = true;
    }
    if (batch.next < batch.count) continue;
    backend_->engine_->free_batch(batch.id);
    line_->num_requests -= batch.count;
  }
  std::erase_if(batches_, [](const Batch& batch) { return batch.next == batch.count; });
  return any;
}

// Turns pieces into requests, each inside one part on either side.
Result<std::uint32_t> MooncakeTransfer::fill(int segment, std::uint32_t most) {
  std::uint32_t count = 0;
  for (; count < most && more_to_send(); ++count) {
    if (rest_.length == 0) rest_ = cursor_.next(UINT64_MAX);
    std::uint64_t length = local_cuts_[rest_.local_region]->within(rest_.local, rest_.length);
    length = remote_cuts_[rest_.remote_region]->within(rest_.remote, length);
    requests_[count] = {plan_.op == Op::kWrite, reinterpret_cast<void*>(rest_.local), segment, 0, rest_.remote, length};
    rest_.local += length;
    rest_.remote += length;
    rest_.length -= length;
  }
  return count;
}

bool MooncakeTransfer::feed_locked() {
  bool any = false;
  while (!error_ && !stopping_ && more_to_send()) {
    const std::uint32_t room = Line::kMaxRequests - line_->num_requests;
    const auto most = static_cast<std::uint32_t>(requests_.size());
    if (room < most) return any;
    const auto segment = line_->segment();
    if (!segment) {
      error_ = segment.error();
      return true;
    }
    if (!*segment) return any;
    Batch batch;
    const auto count = fill(**segment, most);
    const auto started = backend_->engine_->submit({requests_.data(), *count}, batch.id);
    any = true;
    if (!started) error_ = within("Mooncake transfer with agent '" + line_->peer().name + "'", started.error());
    if (batch.id == Engine::kNoBatch) return true;
    batch.count = *count;
    line_->num_requests += batch.count;
    batches_.push_back(batch);
  }
  return any;
}

// Ends the submission when nothing of it is under way any more, or its peer has been gone for too long.
void MooncakeTransfer::settle_locked() {
  if (!running_) return;
  if (!batches_.empty()) {
    const Nanoseconds lost_at = line_->lost_at();
    if (lost_at != 0 && now_ns() - lost_at > kLettingGo) abandon_locked();
    return;
  }
  if (error_ && error_->code == Code::kIo && !stopping_ && !line_->lost()) {
    // Requests fail a moment before the end of the peer shows.
    if (failed_at_ == 0) failed_at_ = now_ns();
    if (now_ns() - failed_at_ < kVerdictTime) return;
  }
  if (!error_ && more_to_send() && !stopping_) return;
  end_locked();
}

void MooncakeTransfer::end_locked() {
  running_ = false;
  std::erase(backend_->running_, this);
  if (error_ && line_->lost())
    error_ = line_->why();
  else if (stopping_)
    error_ = Error{Code::kCancelled, "cancelled"};
  if (!error_ && message_)
    if (auto sent = line_->send(*message_); !sent) error_ = sent.error();
  message_.reset();
}

void MooncakeTransfer::abandon_locked() {
  for (const Batch& batch : batches_) backend_->abandoned_.push_back({batch.id, batch.count, batch.next});
  batches_.clear();
  error_ = line_->why();
  end_locked();
}

}  // namespace nixl::core::mooncake
