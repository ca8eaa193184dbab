// Transfers of the UCX backend: which workers serve one, and what its shares come to.
#include <algorithm>

#include "backends/ucx/backend.h"
#include "backends/ucx/shares.h"

namespace nixl::core::ucx {
namespace {

constexpr std::uint64_t kLargeBytes =
    8 << 20;  // requests of so many bytes are shared out, whatever the number of pieces
constexpr std::uint64_t kLeastShare = 1 << 20;

std::uint64_t num_pieces(const Plan& plan) {
  if (!plan.has_runs()) return plan.num_rows();
  std::uint64_t all = 0;
  for (const std::uint64_t count : plan.count) all += count;
  return all;
}

}  // namespace

std::size_t UcxBackend::choose_worker(const Plan& plan) {
  if (engines_ == 0) return round_robin_.fetch_add(1, std::memory_order_relaxed) % desks_.size();
  return plan.local_regions.empty() ? 0 : static_cast<const Registered*>(plan.local_regions.front())->device();
}

// A share for each thread and one for who polls; one in all where no thread would help.
std::size_t UcxBackend::num_shares(const Plan& plan) const noexcept {
  const auto threads = static_cast<std::size_t>(options_.num_threads);
  if (threads == 0 || !desks_.back().driven) return 1;
  const std::uint64_t pieces = num_pieces(plan), least = options_.split_batch_size;
  if (pieces <= least && plan.total_bytes < kLargeBytes) return 1;
  const std::uint64_t worth = std::max(pieces / std::max<std::uint64_t>(1, least / 2), plan.total_bytes / kLeastShare);
  return std::min<std::size_t>(threads + 1, static_cast<std::size_t>(std::max<std::uint64_t>(1, worth)));
}

Result<std::unique_ptr<Transfer>> UcxBackend::prepare(Plan plan) {
  if (!abilities_.local_kinds.has(plan.local_kind) || !abilities_.remote_kinds.has(plan.remote_kind))
    return fail(Code::kInvalidArgument, "UCX moves DRAM and, with a working driver, VRAM; not %s to %s",
                name(plan.local_kind), name(plan.remote_kind));
  merge_neighbours(plan);
  const std::size_t index = choose_worker(plan);
  auto& connection = static_cast<UcxConnection&>(*plan.peer);
  const Link& first = connection.link(index);
  const bool device_memory = plan.local_kind == MemKind::kVram || plan.remote_kind == MemKind::kVram;
  std::string path = first.path();
  if (device_memory && first.only_tcp()) path = "staged+" + path;
  auto transfer = std::make_unique<UcxTransfer>(*this, std::move(path));
  std::vector<Plan> shares;
  if (const std::size_t parts = num_shares(plan); parts > 1)
    shares = share_out(std::move(plan), parts);
  else
    shares.push_back(std::move(plan));
  for (std::size_t i = 0; i < shares.size(); ++i) {
    const std::size_t at = (index + i) % desks_.size();
    const auto guard = desks_[at].worker->lock();
    transfer->add_lane_locked(std::move(shares[i]), connection.link(at), desks_[at].requests, config_.self.incarnation);
  }
  return transfer;
}

void UcxTransfer::add_lane_locked(Plan plan, Link& link, ReadRequests& requests, std::uint64_t caller_incarnation) {
  total_bytes_ += plan.total_bytes;
  workers_.push_back(&link.worker());
  doors_.push_back(link.worker().mutex());
  lanes_.push_back(std::make_unique<Lane>(std::move(plan), link, requests, shares_, caller_incarnation));
}

UcxTransfer::~UcxTransfer() {
  // A thread that has just ended a lane may not have left it.
  for (const auto& door : doors_) const std::lock_guard left(*door);
}

bool UcxTransfer::running() const noexcept {
  return std::any_of(lanes_.begin(), lanes_.end(),
                     [](const auto& lane) { return lane->state() == Lane::State::kRunning; });
}

Result<TransferState> UcxTransfer::answer() const {
  if (running()) return TransferState::kRunning;
  // Once one share has failed, the others are cancelled: that is not the reason.
  const Error* why = nullptr;
  for (const auto& lane : lanes_)
    if (lane->state() == Lane::State::kFailed && (!why || why->code == Code::kCancelled)) why = &lane->error();
  if (why) return fail(*why);
  return TransferState::kDone;
}

Result<TransferState> UcxTransfer::submit(std::optional<std::string_view> message) {
  shares_.failed.store(false, std::memory_order_relaxed);
  shares_.running.store(static_cast<int>(lanes_.size()), std::memory_order_relaxed);
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    Lane& lane = *lanes_[i];
    {
      const auto guard = workers_[i]->lock();
      lane.start_locked(message);
      if (lane.state() == Lane::State::kRunning) (void)workers_[i]->progress_locked();
    }
    if (lane.state() == Lane::State::kRunning) backend_->wake(*workers_[i]);
  }
  return answer();
}

Result<TransferState> UcxTransfer::poll() {
  const bool failed = shares_.failed.load(std::memory_order_relaxed);
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    if (lanes_[i]->state() != Lane::State::kRunning) continue;
    if (failed && lanes_.size() > 1) {
      const auto guard = workers_[i]->lock();
      (void)lanes_[i]->cancel_locked();
    }
    (void)workers_[i]->progress();
  }
  return answer();
}

bool UcxTransfer::cancel() noexcept {
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    if (lanes_[i]->state() != Lane::State::kRunning) continue;
    const auto guard = workers_[i]->lock();
    if (lanes_[i]->cancel_locked()) continue;
    // What a stopped peer holds, or was asked to put here, cannot be called back: that is waited for.
    (void)workers_[i]->progress_locked();
    (void)lanes_[i]->cancel_locked();
  }
  return !running();
}

Result<CostEstimate> UcxBackend::estimate(const Transfer& transfer) {
  const auto& asked = static_cast<const UcxTransfer&>(transfer);
  Link& link = asked.link();
  const auto guard = link.worker().lock();
  if (!link.endpoint()) return fail(Code::kPeerLost, "agent '%s' is not connected", link.target().name.c_str());
  ucp_ep_evaluate_perf_param_t question{};
  question.field_mask = UCP_EP_PERF_PARAM_FIELD_MESSAGE_SIZE;
  question.message_size = asked.total_bytes();
  ucp_ep_evaluate_perf_attr_t estimate{};
  estimate.field_mask = UCP_EP_PERF_ATTR_FIELD_ESTIMATED_TIME;
  if (const ucs_status_t status = context_->api().ep_evaluate_perf(link.endpoint(), &question, &estimate);
      status != UCS_OK)
    return fail(ucx_error(context_->api(), "estimate of UCX", status, Code::kUnsupported));
  const auto duration = static_cast<std::int64_t>(estimate.estimated_time * 1e6) + 1;
  return CostEstimate{duration, duration / 2};
}

}  // namespace nixl::core::ucx
