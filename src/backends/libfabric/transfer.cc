#include "backends/libfabric/transfer.h"

#include <algorithm>
#include <cstring>

namespace nixl::core::libfabric {
namespace {

constexpr std::uint64_t kMaxPieceBytes = 16 << 20;  // bounds what cannot be cancelled
constexpr std::uint64_t kLeastShare = 64 << 10;     // of a piece that is cut up over several paths
constexpr std::uint64_t kCopyAtOnce = 1 << 20;
constexpr int kMostRestarts = 3;
// Operations that a provider does not end after their peer was lost are given up then.
constexpr Nanoseconds kDrain = 1'000'000'000;

}  // namespace

// ---- all transfers ----

FabricTransfer::~FabricTransfer() {
  const std::lock_guard left(*door_);  // a thread that has just ended us may not have left
}

void FabricTransfer::fail_locked(Error error) {
  if (failed_) return;
  failed_ = true;
  error_ = std::move(error);
}

void FabricTransfer::finish_if_ended_locked() {
  if (state() != State::kRunning || any_in_flight_locked()) return;
  if (!failed_ && !complete_locked()) return;
  if (!failed_)
    if (auto concluded = conclude_locked(); !concluded) fail_locked(std::move(concluded.error()));
  leave_locked();
  engine_->forget_locked(*this);
  state_.store(failed_ ? State::kFailed : State::kDone, std::memory_order_release);
}

Result<TransferState> FabricTransfer::answer() const {
  switch (state()) {
    case State::kRunning:
      return TransferState::kRunning;
    case State::kFailed:
      return fail(error_);
    default:
      return TransferState::kDone;
  }
}

Result<TransferState> FabricTransfer::submit(std::optional<std::string_view> message) {
  {
    const auto guard = engine_->lock();
    failed_ = false;
    error_ = {};
    state_.store(State::kRunning, std::memory_order_relaxed);
    start_locked(message);
    if (state() == State::kRunning) (void)engine_->progress_locked();
  }
  if (state() == State::kRunning) wake_();
  return answer();
}

Result<TransferState> FabricTransfer::poll() {
  if (state() == State::kRunning) {
    (void)engine_->progress();
    if (state() == State::kRunning && failed_) {
      const auto guard = engine_->lock();
      finish_if_ended_locked();
    }
  }
  return answer();
}

bool FabricTransfer::cancel() noexcept {
  if (state() != State::kRunning) return true;
  const auto guard = engine_->lock();
  if (state() != State::kRunning) return true;
  fail_locked(Error{Code::kCancelled, "cancelled by the caller"});
  finish_if_ended_locked();
  if (state() != State::kRunning) return true;
  // What a stopped peer holds cannot be called back: that is waited for.
  (void)engine_->progress_locked();
  finish_if_ended_locked();
  return state() != State::kRunning;
}

// ---- within one agent ----

void OwnTransfer::start_locked(std::optional<std::string_view>) {
  cursor_ = PlanCursor(plan_);
  engine_->queue_locked(*this);
}

Job::Next OwnTransfer::advance_locked() {
  if (state() != State::kRunning) return Next::kNothing;
  for (std::uint64_t bytes = 0; !failed_ && !cursor_.at_end() && bytes < kCopyAtOnce;) {
    const Piece piece = cursor_.next(kCopyAtOnce);
    bytes += piece.length + 64;
    auto *local = reinterpret_cast<void*>(piece.local), *remote = reinterpret_cast<void*>(piece.remote);
    std::memmove(plan_.op == Op::kWrite ? remote : local, plan_.op == Op::kWrite ? local : remote, piece.length);
  }
  finish_if_ended_locked();
  return state() == State::kRunning ? Next::kMore : Next::kNothing;
}

// ---- with a peer ----

void PeerTransfer::start_locked(std::optional<std::string_view> message) {
  message_.reset();
  if (message) message_.emplace(*message);
  num_restarts_ = 0;
  lost_at_ = 0;
  link_->join_locked(*this);
  if (link_->state() == Link::State::kLost) {
    fail_locked(link_->lost_because());
    finish_if_ended_locked();
    return;
  }
  begin_locked();
}

void PeerTransfer::begin_locked() {
  restart_ = begun_ = false;
  cursor_ = PlanCursor(plan_);
  piece_ = {};
  if (link_->state() != Link::State::kReady) return;  // link_up_locked() follows
  begun_ = true;
  choose_paths_locked();
  if (!check_regions_locked()) {
    finish_if_ended_locked();
    return;
  }
  engine_->queue_locked(*this);
}

void PeerTransfer::choose_paths_locked() {
  paths_ = link_->paths_up();
  turn_ = 0;
  const std::uint64_t limit = engine_->options().max_gbits_per_segment;
  if (limit == 0 || plan_.local_kind != MemKind::kDram) return;
  std::uint64_t gbits = 0;
  for (std::size_t i = 0; i < paths_.size(); ++i) {
    gbits += paths_[i]->rail->gbits();
    if (gbits > limit) {
      paths_.resize(std::max<std::size_t>(i, 1));
      return;
    }
  }
}

bool PeerTransfer::check_regions_locked() {
  for (RemoteRegion* const entry : plan_.remote_regions) {
    const auto& region = static_cast<const Imported&>(*entry);
    if (region.revoked())
      fail_locked(
          Error{Code::kNotFound, "agent '" + link_->peer().name + "' has deregistered memory that this transfer uses"});
    for (const Link::Path* const path : paths_)
      if (path->remote_rail >= region.num_rails())
        fail_locked(Error{Code::kMismatch, "a region of agent '" + link_->peer().name + "' has keys for " +
                                               std::to_string(region.num_rails()) + " rails, the agent has more"});
  }
  return !failed_;
}

Job::Next PeerTransfer::advance_locked() {
  if (state() != State::kRunning) return Next::kNothing;
  if (restart_ && in_flight_ == 0 && !failed_ && link_->state() == Link::State::kReady) {
    begin_locked();
    if (state() != State::kRunning) return Next::kNothing;
  }
  Next next = Next::kNothing;
  if (begun_ && !restart_ && !failed_ && link_->state() == Link::State::kReady && check_regions_locked())
    next = issue_locked();
  finish_if_ended_locked();
  return state() == State::kRunning ? next : Next::kNothing;
}

Job::Next PeerTransfer::issue_locked() {
  for (std::uint64_t i = 0; i < engine_->options().split_batch_size; ++i) {
    if (piece_.length == 0) {
      if (cursor_.at_end()) return Next::kNothing;
      piece_ = cursor_.next(kMaxPieceBytes);
      const bool stripes = paths_.size() > 1 && piece_.length >= engine_->options().striping_threshold;
      share_ = stripes ? std::max((piece_.length + paths_.size() - 1) / paths_.size(), kLeastShare) : piece_.length;
    }
    const Link::Path& path = *paths_[turn_ % paths_.size()];
    const std::uint64_t length = std::min({share_, piece_.length, path.rail->most_bytes()});
    Operation* const operation = engine_->take_operation_locked(*this, path.rail->index());
    if (!operation) return Next::kBlocked;
    if (const long status = post_locked(path, length, *operation); status != 0) {
      engine_->give_back_locked(*operation);
      if (status == -FI_EAGAIN) return Next::kBlocked;
      ++in_flight_;  // as if it had been taken and had failed
      completed_locked({}, status);
      return Next::kNothing;
    }
    ++in_flight_;
    ++turn_;
    piece_.local += length;
    piece_.remote += length;
    piece_.length -= length;
  }
  return Next::kMore;
}

long PeerTransfer::post_locked(const Link::Path& path, std::uint64_t length, Operation& operation) {
  const auto& local = static_cast<const Registered&>(*plan_.local_regions[piece_.local_region]);
  const auto& remote =
      static_cast<const Imported&>(*plan_.remote_regions[piece_.remote_region]).on_rail(path.remote_rail);
  const Rail::Piece piece{reinterpret_cast<void*>(piece_.local), length,   piece_.remote - remote.base, remote.key,
                          local.descriptor(path.rail->index()),  path.peer};
  return plan_.op == Op::kWrite ? path.rail->write_locked(piece, operation) : path.rail->read_locked(piece, operation);
}

void PeerTransfer::completed_locked(const Operation&, long error) {
  --in_flight_;
  if (error != 0 && !restart_ && !failed_) {
    const Error why =
        fabric_error(engine_->api(), "transfer with agent '" + link_->peer().name + "' over " + path_, error);
    if (!breaks_the_way(error) || num_restarts_ >= kMostRestarts)
      fail_locked(why);
    else
      link_->broke_locked(why);  // calls link_down_locked() or link_lost_locked()
  }
  if (in_flight_ == 0 || failed_) engine_->queue_locked(*this);
}

void PeerTransfer::link_up_locked() {
  if (state() != State::kRunning) return;
  restart_ = true;
  engine_->queue_locked(*this);
}

void PeerTransfer::link_down_locked() {
  if (state() != State::kRunning) return;
  restart_ = true;
  if (begun_) ++num_restarts_;
  begun_ = false;
}

void PeerTransfer::link_lost_locked(const Error& why) {
  if (state() != State::kRunning) return;
  lost_at_ = now_ns();
  fail_locked(why);
  finish_if_ended_locked();
}

void PeerTransfer::abandon_locked() {
  if (state() != State::kRunning) return;
  lost_at_ = now_ns() - kDrain;
  fail_locked(Error{Code::kPeerLost, "the connection to agent '" + link_->peer().name + "' was closed"});
  finish_if_ended_locked();
}

bool PeerTransfer::any_in_flight_locked() {
  if (in_flight_ > 0 && lost_at_ != 0 && now_ns() - lost_at_ >= kDrain) {
    engine_->orphan_locked(*this);
    in_flight_ = 0;
  }
  return in_flight_ > 0;
}

Result<void> PeerTransfer::conclude_locked() {
  return message_ ? link_->notify_locked(*message_) : Result<void>();
}

void PeerTransfer::leave_locked() {
  link_->leave_locked(*this);
}

}  // namespace nixl::core::libfabric
