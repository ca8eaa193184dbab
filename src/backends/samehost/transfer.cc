#include "backends/samehost/transfer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

#include "backends/samehost/offered_copy.h"

namespace nixl::core::samehost {

Result<void> check_mapped(std::uint64_t address, std::uint64_t bytes) {
  static const std::uint64_t page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  const std::uint64_t lead = address % page;
  // Asynchronous, it starts nothing: it only looks whether all of this is mapped.
  if (bytes == 0 || ::msync(reinterpret_cast<void*>(address - lead), bytes + lead, MS_ASYNC) == 0) return {};
  return fail(Code::kIo, "local memory at %#llx (%llu bytes) is not mapped; was it freed while registered?",
              static_cast<unsigned long long>(address), static_cast<unsigned long long>(bytes));
}

void Ending::set_message(std::optional<std::string_view> message) {
  has_message_ = message.has_value();
  if (message) message_ = *message;
}

Result<void> Ending::check_registered(std::uint32_t region) const {
  if (static_cast<const FarRegion*>(regions_[region])->registered()) return {};
  return fail(Code::kNotFound, "agent '%s' has deregistered memory of this transfer (region %u of the %zu it touches)",
              peer_->id().name.c_str(), region, regions_.size());
}

Result<void> Ending::check_all_registered() const {
  for (std::uint32_t region = 0; region < regions_.size(); ++region) NIXL_TRY(check_registered(region));
  return {};
}

Result<void> Ending::finish() {
  // A region taken back meanwhile may hold other data by now: what was copied does not count.
  NIXL_TRY(check_all_registered());
  if (has_message_) peer_->send(message_);
  return {};
}

CopyJob::CopyJob(Plan plan, std::vector<Position> starts, std::shared_ptr<Mailbox> mailbox)
    : TransferJob(starts.empty() ? 0 : static_cast<std::uint32_t>(starts.size() - 1), plan, std::move(mailbox)),
      plan_(std::move(plan)),
      starts_(std::move(starts)) {
  for (const RemoteRegion* const region : plan_.remote_regions) {
    const SharedMapping* const shared = static_cast<const FarRegion*>(region)->shared();
    if (!shared) {
      deltas_.clear();
      break;
    }
    deltas_.push_back(shared->delta());
  }
}

Result<void> CopyJob::copy_chunk(std::uint32_t index) {
  PeerConnection& peer = ending.peer();
  if (peer.lost() || mapped()) NIXL_TRY(peer.check_alive());
  Pieces pieces;
  gather(plan_, starts_[index], starts_[index + 1], pieces, mapped() ? deltas_.data() : nullptr);
  for (std::size_t i = 0; i < pieces.num_regions; ++i) NIXL_TRY(ending.check_registered(pieces.regions[i]));
  if (mapped()) {
    const bool write = plan_.op == Op::kWrite;
    for (std::size_t i = 0; i < pieces.count; ++i)
      std::memcpy(write ? pieces.remote[i].iov_base : pieces.local[i].iov_base,
                  write ? pieces.local[i].iov_base : pieces.remote[i].iov_base, pieces.local[i].iov_len);
    return {};
  }
  auto copied =
      peer.process().copy(plan_.op, {pieces.local.data(), pieces.count}, {pieces.remote.data(), pieces.count});
  if (!copied && copied.error().code == Code::kPeerLost) NIXL_TRY(peer.check_alive(true));
  return copied;
}

JobTransfer::JobTransfer(const Plan& plan, std::shared_ptr<TransferJob> job, std::shared_ptr<CopyThreads> threads,
                         std::string path, std::shared_ptr<OfferedCopy> offered)
    : SizedTransfer(plan),
      job_(job),
      plain_(std::move(job)),
      offered_(std::move(offered)),
      threads_(std::move(threads)),
      path_(std::move(path)) {}

Result<TransferState> JobTransfer::submit(std::optional<std::string_view> message) {
  if (!threads_) {  // the chunk asks for itself whether the peer lives
    job_->ending.set_message(message);
    auto done = job_->run_alone();
    alone_ = done ? std::nullopt : std::optional<Error>(std::move(done).error());
    return outcome();
  }
  NIXL_TRY(job_->ending.peer().check_alive());
  if (offered_) job_ = offered_->acquire() ? offered_ : plain_;
  job_->ending.set_message(message);
  job_->start();
  threads_->add(job_);
  return TransferState::kRunning;
}

Result<TransferState> JobTransfer::poll() {
  if (!job_->finished()) job_->run_one();
  if (!job_->finished()) return TransferState::kRunning;
  return outcome();
}

Result<TransferState> JobTransfer::outcome() const {
  const auto& error = threads_ ? job_->error() : alone_;
  if (error) return fail(*error);
  return TransferState::kDone;
}

bool JobTransfer::cancel() noexcept {
  if (!job_->finished()) job_->abandon({Code::kCancelled, "cancelled by the caller"});
  return job_->finished();
}

std::unique_ptr<Transfer> make_copy(Plan plan, std::shared_ptr<Mailbox> mailbox, std::shared_ptr<CopyThreads>& threads,
                                    bool pull) {
  auto starts = cut(plan);
  const bool small = starts.size() <= 2;
  if (!small && !threads) threads = CopyThreads::shared();
  auto job = std::make_shared<CopyJob>(std::move(plan), std::move(starts), mailbox);
  auto offered = pull && !job->mapped() ? OfferedCopy::make(job->plan(), std::move(mailbox)) : nullptr;
  return std::make_unique<JobTransfer>(job->plan(), job, small ? nullptr : threads, job->mapped() ? "shm" : "cma",
                                       std::move(offered));
}

}  // namespace nixl::core::samehost
