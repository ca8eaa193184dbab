#include "backends/ucx/read_service.h"

namespace nixl::core::ucx {
namespace {

constexpr int kWindow = 128;
constexpr int kIssueAtOnce = 32;
constexpr std::uint64_t kIssueBytesAtOnce = 1 << 20;

}  // namespace

ReadService::ReadService(std::string bytes, Link& link, const ExposedTable& exposed)
    : bytes_(std::move(bytes)), link_(&link), exposed_(&exposed) {}

ReadService::~ReadService() {
  for (const auto& region : regions_) region->readers.fetch_sub(1, std::memory_order_release);
  for (const ucp_rkey_h key : keys_) link_->worker().api().rkey_destroy(key);
}

void ReadService::start_locked() {
  link_->join_locked(*this);
  outcome_ = prepare_locked();
  link_->worker().queue_locked(*this);
}

Result<void> ReadService::prepare_locked() {
  NIXL_TRY(decode(bytes_, request_));
  for (const ReadPiece& piece : request_.pieces) {
    auto region = exposed_->find(piece.region);
    if (!region || region->revoked.load(std::memory_order_acquire))
      return fail(Code::kNotFound, "memory 0x%llx is no longer registered",
                  static_cast<unsigned long long>(piece.source));
    const std::uint64_t offset = piece.source - region->address;
    if (piece.source < region->address || offset > region->length || piece.length > region->length - offset)
      return fail(Code::kInvalidArgument,
                  "read of %llu bytes at 0x%llx lies outside the region at 0x%llx of %llu bytes",
                  static_cast<unsigned long long>(piece.length), static_cast<unsigned long long>(piece.source),
                  static_cast<unsigned long long>(region->address), static_cast<unsigned long long>(region->length));
    region->readers.fetch_add(1, std::memory_order_relaxed);
    regions_.push_back(std::move(region));
  }
  const Api& api = link_->worker().api();
  for (const std::string_view key : request_.keys) {
    ucp_rkey_h unpacked = nullptr;
    if (const ucs_status_t status = api.ep_rkey_unpack(link_->endpoint(), key.data(), &unpacked); status != UCS_OK)
      return fail(operation_error(api, "unpack the asker's key", status));
    keys_.push_back(unpacked);
  }
  return {};
}

bool ReadService::advance_locked() {
  if (ended_) return false;
  if (outcome_ && !link_gone_)
    if (auto issued = issue_locked(); !issued) outcome_ = std::move(issued);
  const bool all_issued = next_ == request_.pieces.size() && flushed_;
  if (in_flight_ == 0 && (!outcome_ || link_gone_ || all_issued)) {
    end_locked();
    return false;
  }
  return outcome_ && !link_gone_ && next_ < request_.pieces.size() && in_flight_ < kWindow;
}

Result<void> ReadService::issue_locked() {
  Worker& worker = link_->worker();
  std::uint64_t bytes = 0;
  for (int i = 0;
       i < kIssueAtOnce && bytes < kIssueBytesAtOnce && next_ < request_.pieces.size() && in_flight_ < kWindow; ++i) {
    const ReadPiece& piece = request_.pieces[next_];
    const Exposed& region = *regions_[next_];
    if (region.revoked.load(std::memory_order_acquire))
      return fail(Code::kNotFound, "memory 0x%llx was deregistered meanwhile",
                  static_cast<unsigned long long>(piece.source));
    ++next_;
    bytes += piece.length;
    const Worker::Piece operation{reinterpret_cast<void*>(piece.source), piece.destination, piece.length,
                                  region.memory->handle(), keys_[piece.key]};
    NIXL_ASSIGN(const bool in_flight, worker.put_locked(*this, link_->endpoint(), operation));
    in_flight_ += in_flight;
  }
  if (next_ == request_.pieces.size() && !flushed_) {
    flushed_ = true;
    NIXL_ASSIGN(const bool in_flight, worker.flush_locked(*this, link_->endpoint()));
    in_flight_ += in_flight;
  }
  return {};
}

void ReadService::completed_locked(ucs_status_t status) {
  --in_flight_;
  if (abandoned_) return;
  if (status != UCS_OK && outcome_) outcome_ = fail(operation_error(link_->worker().api(), "put for a read", status));
  link_->worker().queue_locked(*this);
}

void ReadService::link_lost_locked(const Error&) {
  link_gone_ = true;
  link_->worker().queue_locked(*this);
}

void ReadService::abandon_locked() {
  abandoned_ = true;
  link_->worker().forget_locked(*this);
}

void ReadService::end_locked() {
  ended_ = true;
  for (const auto& region : regions_)
    if (outcome_ && region->revoked.load(std::memory_order_acquire))
      outcome_ = fail(Code::kNotFound, "memory was deregistered while it was read");
  if (!link_gone_) {
    const ReadDone done{request_.request, outcome_ ? 0u : 1u + static_cast<std::uint32_t>(outcome_.error().code),
                        outcome_ ? std::string_view() : std::string_view(outcome_.error().reason)};
    (void)link_->worker().send_locked(link_->endpoint(), kReadDone,
                                      encode(done));  // a broken link tells the asker by itself
  }
  link_->leave_locked(*this);
}

}  // namespace nixl::core::ucx
