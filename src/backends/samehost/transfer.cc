#include "backends/samehost/transfer.h"

namespace nixl::core::samehost {
namespace {

std::uint32_t num_chunks(const std::vector<Position>& starts) {
  return starts.empty() ? 0 : static_cast<std::uint32_t>(starts.size() - 1);
}

}  // namespace

CopyJob::CopyJob(Plan plan, std::vector<Position> starts, std::shared_ptr<Mailbox> mailbox)
    : Job(num_chunks(starts)), plan_(std::move(plan)), starts_(std::move(starts)), mailbox_(std::move(mailbox)) {}

void CopyJob::set_message(std::optional<std::string_view> message) {
  has_message_ = message.has_value();
  if (message) message_ = *message;
}

Result<void> CopyJob::check_registered(std::uint32_t region) const {
  if (static_cast<const FarRegion*>(plan_.remote_regions[region])->registered()) return {};
  return fail(Code::kNotFound, "agent '%s' has deregistered memory of this transfer (its region %u of %zu)",
              peer().id().name.c_str(), region, plan_.remote_regions.size());
}

Result<void> CopyJob::copy_chunk(std::uint32_t index) {
  NIXL_TRY(peer().check_alive());
  Pieces pieces;
  gather(plan_, starts_[index], starts_[index + 1], pieces);
  for (std::size_t i = 0; i < pieces.num_regions; ++i) NIXL_TRY(check_registered(pieces.regions[i]));
  auto copied =
      peer().process().copy(plan_.op, {pieces.local.data(), pieces.count}, {pieces.remote.data(), pieces.count});
  if (!copied && copied.error().code == Code::kPeerLost) return peer().check_alive(true);
  return copied;
}

Result<void> CopyJob::complete() {
  // A region taken back meanwhile may hold other data by now: what was copied does not count.
  for (std::uint32_t region = 0; region < plan_.remote_regions.size(); ++region) NIXL_TRY(check_registered(region));
  if (has_message_) peer().send(message_);
  return {};
}

CopyTransfer::CopyTransfer(Plan plan, std::shared_ptr<Mailbox> mailbox, std::shared_ptr<CopyThreads>& threads) {
  auto starts = cut(plan);
  if (num_chunks(starts) > 1) {
    if (!threads) threads = CopyThreads::shared();
    threads_ = threads;
  }
  job_ = std::make_shared<CopyJob>(std::move(plan), std::move(starts), std::move(mailbox));
}

Result<TransferState> CopyTransfer::submit(std::optional<std::string_view> message) {
  NIXL_TRY(job_->peer().check_alive());
  job_->set_message(message);
  job_->start();
  if (threads_) {
    threads_->add(job_);
    return TransferState::kRunning;
  }
  job_->run_one();
  return outcome();
}

Result<TransferState> CopyTransfer::poll() {
  if (!job_->finished()) job_->run_one();
  if (!job_->finished()) return TransferState::kRunning;
  return outcome();
}

Result<TransferState> CopyTransfer::outcome() const {
  if (job_->error()) return fail(*job_->error());
  return TransferState::kDone;
}

bool CopyTransfer::cancel() noexcept {
  if (!job_->finished()) job_->abandon({Code::kCancelled, "cancelled by the caller"});
  return job_->finished();
}

}  // namespace nixl::core::samehost
