// The target's side of pulled writes: takes offers and works them off on the copy threads.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/samehost/connection.h"
#include "backends/samehost/pull_board.h"

namespace nixl::core::samehost {

struct PullSource;

// Thread-safe; nothing here blocks for longer than opening a process takes.
class Puller {
 public:
  static constexpr const char* kEnv = "NIXL_SAME_HOST_PULL";
  Puller(std::shared_ptr<Mailbox> mailbox, std::shared_ptr<SlotTable> slots)
      : mailbox_(std::move(mailbox)), slots_(std::move(slots)) {}
  // Starts to pull what is offered. An offer that makes no sense, or whose initiator cannot be read, is dropped: then
  // that one pushes.
  void accept(std::string_view offer);

 private:
  Result<void> start(std::string_view bytes);
  Result<std::shared_ptr<PullSource>> source(const Offer& offer);
  static Result<std::shared_ptr<PullSource>> open(const Offer& offer);

  const std::shared_ptr<Mailbox> mailbox_;
  const std::shared_ptr<SlotTable> slots_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<PullSource>> sources_;  // the one used last at the end
  std::vector<std::uint64_t> refused_;                // boards
  std::shared_ptr<CopyThreads> threads_;
};

}  // namespace nixl::core::samehost
