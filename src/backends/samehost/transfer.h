// A prepared list of copies between this process and a peer's memory.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "backends/samehost/chunks.h"
#include "backends/samehost/connection.h"
#include "backends/samehost/job.h"
#include "contract/backend.h"

namespace nixl::core::samehost {

// kIo where memory of ours has holes: its owner unmapped it. One system call, whatever its size.
Result<void> check_mapped(std::uint64_t address, std::uint64_t bytes);

// What follows the last byte of a submission: the regions are checked once more, then the message leaves.
class Ending {
 public:
  explicit Ending(const Plan& plan) : peer_(static_cast<PeerConnection*>(plan.peer)), regions_(plan.remote_regions) {}
  PeerConnection& peer() const noexcept { return *peer_; }
  void set_message(std::optional<std::string_view> message);
  Result<void> check_registered(std::uint32_t region) const;
  Result<void> check_all_registered() const;
  Result<void> finish();

 private:
  PeerConnection* peer_;
  std::vector<RemoteRegion*> regions_;
  std::string message_;
  bool has_message_ = false;
};

// A job that moves one plan; announces its end to our own sleeping progress.
class TransferJob : public Job {
 public:
  TransferJob(std::uint32_t num_chunks, const Plan& plan, std::shared_ptr<Mailbox> mailbox)
      : Job(num_chunks), ending(plan), mailbox_(std::move(mailbox)) {}
  Ending ending;

 protected:
  Result<void> complete() override { return ending.finish(); }
  void announce() noexcept override { mailbox_->ring_own(); }

  const std::shared_ptr<Mailbox> mailbox_;
};

// DRAM to DRAM.
class CopyJob final : public TransferJob {
 public:
  CopyJob(Plan plan, std::vector<Position> starts, std::shared_ptr<Mailbox> mailbox);
  const Plan& plan() const noexcept { return plan_; }
  bool mapped() const noexcept { return !deltas_.empty(); }

 private:
  Result<void> copy_chunk(std::uint32_t index) override;

  const Plan plan_;
  std::vector<std::uint64_t> deltas_;  // of the remote regions when all of them are mapped here
  const std::vector<Position> starts_;
};

// Every transfer of this backend; its cost is estimated from its size.
class SizedTransfer : public Transfer {
 public:
  explicit SizedTransfer(const Plan& plan) : num_blocks(plan.num_blocks), total_bytes(plan.total_bytes) {}
  const std::uint64_t num_blocks, total_bytes;
};

class OfferedCopy;

// Runs a TransferJob: where it is submitted when it has one chunk, else on the copy threads and in poll().
class JobTransfer final : public SizedTransfer {
 public:
  JobTransfer(const Plan& plan, std::shared_ptr<TransferJob> job, std::shared_ptr<CopyThreads> threads,
              std::string path, std::shared_ptr<OfferedCopy> offered = nullptr);
  Result<TransferState> submit(std::optional<std::string_view> message) override;
  Result<TransferState> poll() override;
  bool cancel() noexcept override;
  std::string path() const override { return path_; }

 private:
  Result<TransferState> outcome() const;

  std::shared_ptr<TransferJob> job_;  // of the last submission: one of the next two
  const std::shared_ptr<TransferJob> plain_;
  const std::shared_ptr<OfferedCopy> offered_;  // null: nothing the peer could pull
  std::shared_ptr<CopyThreads> threads_;        // null: one chunk at most, copied where it is submitted
  std::optional<Error> alone_;                  // how that went
  std::string path_;
};

// DRAM to DRAM. `threads` is started when it is first needed. `pull`: the peer may be asked to pull.
std::unique_ptr<Transfer> make_copy(Plan plan, std::shared_ptr<Mailbox> mailbox, std::shared_ptr<CopyThreads>& threads,
                                    bool pull);

}  // namespace nixl::core::samehost
