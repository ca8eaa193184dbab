#include "backends/ucx/transfer.h"

#include <algorithm>

namespace nixl::core::ucx {
namespace {

constexpr std::uint64_t kMaxPieceBytes = 16 << 20;  // bounds what cannot be cancelled
constexpr int kWindow = 128;                        // operations in flight a lane
constexpr int kIssueAtOnce = 32;                    // then others get their turn
constexpr std::uint64_t kIssueBytesAtOnce = 1 << 20;
constexpr int kRequestWindow = 4;  // read requests waiting for their answers a lane
constexpr std::uint64_t kRequestBytes = 8 << 20;
constexpr std::size_t kRequestPieces = 512;

}  // namespace

Lane::Lane(Plan plan, Link& link, ReadRequests& requests, Shares& shares, std::uint64_t caller_incarnation)
    : plan_(std::move(plan)),
      link_(&link),
      requests_(&requests),
      shares_(&shares),
      caller_incarnation_(caller_incarnation),
      by_request_(plan_.op == Op::kRead && link.reads_by_request()),
      cursor_(plan_) {}

void Lane::start_locked(std::optional<std::string_view> message) {
  message_.reset();
  if (message) message_.emplace(*message);
  error_ = {};
  suspect_.reset();
  failed_ = restart_ = false;
  state_.store(State::kRunning, std::memory_order_relaxed);
  link_->join_locked(*this);
  if (link_->state() == Link::State::kLost) {
    fail_locked(link_->lost_because());
    finish_if_ended_locked();
    return;
  }
  begin_locked();
}

void Lane::begin_locked() {
  restart_ = false;
  flushed_ = false;
  cursor_ = PlanCursor(plan_);
  if (link_->state() != Link::State::kReady) return;  // link_up_locked() follows
  for (std::size_t i = 0; i < plan_.remote_regions.size() && !failed_; ++i) {
    if (remote(static_cast<std::uint32_t>(i)).revoked())
      fail_locked(Error{Code::kNotFound,
                        "agent '" + link_->target().name + "' has deregistered memory that this transfer uses"});
  }
  keys_.clear();
  if (!by_request_ && !failed_) {
    for (std::size_t i = 0; i < plan_.remote_regions.size(); ++i) {
      auto key = remote(static_cast<std::uint32_t>(i)).key_locked(*link_);
      if (!key) {
        fail_locked(std::move(key.error()));
        break;
      }
      keys_.push_back(*key);
    }
  }
  if (advance_locked()) link_->worker().queue_locked(*this);
}

bool Lane::advance_locked() {
  if (state() != State::kRunning) return false;
  // Operations report a broken endpoint before the endpoint does; by now the link would have gone down and we would
  // start over.
  if (suspect_ && !restart_) fail_locked(*suspect_);
  suspect_.reset();
  const bool usable = !failed_ && link_->state() == Link::State::kReady;
  if (usable && restart_ && in_flight_ == 0) {
    begin_locked();
    return false;
  }
  const bool more = usable && !restart_ && (by_request_ ? issue_requests_locked() : issue_locked());
  finish_if_ended_locked();
  return more && state() == State::kRunning;
}

void Lane::note_locked(Error error) {
  if (error.code == Code::kPeerLost)
    suspect_ = std::move(error);
  else
    fail_locked(std::move(error));
  link_->worker().queue_locked(*this);
}

bool Lane::issue_locked() {
  Worker& worker = link_->worker();
  std::uint64_t bytes = 0;
  for (int i = 0; i < kIssueAtOnce && bytes < kIssueBytesAtOnce && !cursor_.at_end() && in_flight_ < kWindow; ++i) {
    const Piece piece = cursor_.next(kMaxPieceBytes);
    bytes += piece.length;
    const Worker::Piece operation{reinterpret_cast<void*>(piece.local), piece.remote, piece.length,
                                  local(piece.local_region).exposed().memory->handle(), keys_[piece.remote_region]};
    const auto in_flight = plan_.op == Op::kWrite ? worker.put_locked(*this, link_->endpoint(), operation)
                                                  : worker.get_locked(*this, link_->endpoint(), operation);
    if (!in_flight) {
      note_locked(in_flight.error());
      return false;
    }
    in_flight_ += *in_flight;
  }
  if (!cursor_.at_end()) return in_flight_ < kWindow;
  if (plan_.op == Op::kWrite && !flushed_) {
    // Only a flush says that the data is in the target's memory.
    flushed_ = true;
    const auto in_flight = worker.flush_locked(*this, link_->endpoint());
    if (!in_flight)
      note_locked(in_flight.error());
    else
      in_flight_ += *in_flight;
  }
  return false;
}

bool Lane::issue_requests_locked() {
  while (!cursor_.at_end() && unanswered_ < kRequestWindow) {
    ReadRequest request{caller_incarnation_, link_->id(), 0, {}, {}};
    std::vector<std::uint32_t> key_of(plan_.local_regions.size(), UINT32_MAX);
    for (std::uint64_t bytes = 0;
         !cursor_.at_end() && bytes < kRequestBytes && request.pieces.size() < kRequestPieces;) {
      const Piece piece = cursor_.next(kRequestBytes);
      bytes += piece.length;
      std::uint32_t& key = key_of[piece.local_region];
      if (key == UINT32_MAX) {
        key = static_cast<std::uint32_t>(request.keys.size());
        request.keys.push_back(local(piece.local_region).exposed().memory->remote_key());
      }
      request.pieces.push_back({remote(piece.remote_region).id(), piece.remote, piece.local, piece.length, key});
    }
    request.request = requests_->open(*this);
    request_ids_.push_back(request.request);
    ++unanswered_;
    if (auto sent = link_->worker().send_locked(link_->endpoint(), kReadRequest, encode(request)); !sent) {
      (void)requests_->close(request.request);
      std::erase(request_ids_, request.request);
      --unanswered_;
      note_locked(std::move(sent.error()));
      return false;
    }
  }
  return false;  // an answer makes room for the next one
}

void Lane::answered_locked(const ReadDone& done) {
  --unanswered_;
  std::erase(request_ids_, done.request);
  if (done.code != 0)
    fail_locked(
        Error{static_cast<Code>(std::min<std::uint32_t>(done.code - 1, static_cast<std::uint32_t>(Code::kInternal))),
              "agent '" + link_->target().name + "': " + std::string(done.reason)});
  if (advance_locked())
    link_->worker().queue_locked(*this);
  else
    finish_if_ended_locked();
}

void Lane::completed_locked(ucs_status_t status) {
  --in_flight_;
  if (abandoned_) return;
  if (status != UCS_OK && !restart_)
    note_locked(operation_error(link_->worker().api(),
                                "transfer with agent '" + link_->target().name + "' over " + link_->path(), status));
  // UCX must not be entered from its callback: progress comes back to the rest.
  link_->worker().queue_locked(*this);
}

void Lane::link_up_locked() {
  if (state() != State::kRunning) return;
  restart_ = true;
  link_->worker().queue_locked(*this);
}

void Lane::link_down_locked() {
  restart_ = true;
  suspect_.reset();
  for (const std::uint64_t id : request_ids_) (void)requests_->close(id);
  request_ids_.clear();
  unanswered_ = 0;
}

void Lane::link_lost_locked(const Error& why) {
  link_down_locked();
  if (!failed_ || error_.code != Code::kPeerLost) {
    failed_ = true;
    error_ = why;
  }
  finish_if_ended_locked();
}

void Lane::abandon_locked() {
  abandoned_ = true;
  link_->worker().forget_locked(*this);
  for (const std::uint64_t id : request_ids_) (void)requests_->close(id);
  request_ids_.clear();
}

void Lane::fail_locked(Error error) {
  if (failed_) return;
  failed_ = true;
  error_ = std::move(error);
}

void Lane::finish_if_ended_locked() {
  if (state() != State::kRunning || in_flight_ > 0 || unanswered_ > 0) return;
  if (!failed_ && (restart_ || !cursor_.at_end() || (plan_.op == Op::kWrite && !flushed_))) return;
  if (failed_) shares_->failed.store(true, std::memory_order_relaxed);
  const bool last = shares_->running.fetch_sub(1, std::memory_order_acq_rel) == 1;
  if (last && message_ && !shares_->failed.load(std::memory_order_relaxed)) {
    if (auto sent = link_->notify_locked(*message_); !sent) fail_locked(std::move(sent.error()));
  }
  link_->leave_locked(*this);
  link_->worker().forget_locked(*this);
  Worker& worker = link_->worker();
  state_.store(failed_ ? State::kFailed : State::kDone, std::memory_order_release);
  worker.job_ended_locked();  // who polls may have destroyed this lane by now
}

bool Lane::cancel_locked() {
  if (state() != State::kRunning) return true;
  if (!failed_) {
    failed_ = true;
    error_ = Error{Code::kCancelled, "cancelled by the caller"};
  }
  finish_if_ended_locked();
  return state() != State::kRunning;
}

}  // namespace nixl::core::ucx
