// A WRITE of long stretches that its target may pull: reading is the quicker way through the kernel. Until the target
// answers, and whenever it does not move on, the initiator pushes.
#pragma once
#include <memory>
#include <mutex>

#include "backends/samehost/pull_board.h"
#include "backends/samehost/transfer.h"

namespace nixl::core::samehost {

class OfferedCopy final : public TransferJob {
 public:
  // null where a pull would gain nothing (READs, short pieces, little in all) or the board cannot be had.
  static std::shared_ptr<OfferedCopy> make(const Plan& plan, std::shared_ptr<Mailbox> mailbox);
  OfferedCopy(const Plan& plan, OfferedRows rows, std::shared_ptr<PullDesk> desk, std::shared_ptr<Mailbox> mailbox);

  // Before start(): false while another transfer of this connection has the board.
  bool acquire() noexcept { return !desk_->taken.exchange(true, std::memory_order_acq_rel); }
  void start() override;
  bool run_one() override;
  bool work() override;
  void abandon(Error why) noexcept override;

 private:
  Result<void> copy_chunk(std::uint32_t index) override;
  bool step();
  bool peer_joined() const noexcept;
  bool peer_pulls() noexcept;
  void rest(std::uint32_t seen, long at_most_ns) noexcept;
  bool push_one();
  void push(std::uint32_t chunk);
  bool recover();
  bool take_back(std::uint32_t chunk);
  void end_if_moved();

  const OfferedRows rows_;
  const std::shared_ptr<PullDesk> desk_;
  std::atomic<std::uint64_t> offer_{0};
  std::atomic<Nanoseconds> offered_at_{0};
  std::atomic<std::uint32_t> seen_{0};  // of the target's moves, and when that changed last
  std::atomic<Nanoseconds> seen_at_{0};
  std::atomic<Nanoseconds> rested_at_{0};  // by who polls
  std::atomic<bool> watched_{false};       // a copy thread waits for the target
  std::mutex share_mutex_;                 // of what follows, and of revoking
  std::uint32_t moved_ = 0;                // chunks before this one are done
  bool ended_ = false;
};

}  // namespace nixl::core::samehost
