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

class CopyJob final : public Job {
 public:
  CopyJob(Plan plan, std::vector<Position> starts, std::shared_ptr<Mailbox> mailbox);
  PeerConnection& peer() const noexcept { return static_cast<PeerConnection&>(*plan_.peer); }
  const Plan& plan() const noexcept { return plan_; }
  void set_message(std::optional<std::string_view> message);

 protected:
  Result<void> copy_chunk(std::uint32_t index) override;
  Result<void> complete() override;
  void announce() noexcept override { mailbox_->ring_own(); }

 private:
  Result<void> check_registered(std::uint32_t region) const;

  const Plan plan_;
  const std::vector<Position> starts_;
  const std::shared_ptr<Mailbox> mailbox_;
  std::string message_;
  bool has_message_ = false;
};

class CopyTransfer final : public Transfer {
 public:
  CopyTransfer(Plan plan, std::shared_ptr<Mailbox> mailbox, std::shared_ptr<CopyThreads>& threads);
  Result<TransferState> submit(std::optional<std::string_view> message) override;
  Result<TransferState> poll() override;
  bool cancel() noexcept override;
  std::string path() const override { return "cma"; }
  const Plan& plan() const noexcept { return job_->plan(); }

 private:
  Result<TransferState> outcome() const;

  std::shared_ptr<CopyJob> job_;
  std::shared_ptr<CopyThreads> threads_;  // null: small enough to be copied where it is submitted
};

}  // namespace nixl::core::samehost
