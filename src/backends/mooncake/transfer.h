// One transfer through the engine: its pieces go out in batches, a few at a time, since the engine refuses more.
#pragma once
#include <optional>
#include <string>
#include <vector>

#include "backends/mooncake/backend.h"
#include "contract/plan_cursor.h"

namespace nixl::core::mooncake {

inline constexpr std::uint32_t kMaxBatch = 256;  // requests

class MooncakeTransfer final : public Transfer {
 public:
  MooncakeTransfer(MooncakeBackend& backend, Plan plan);
  Result<TransferState> submit(std::optional<std::string_view> message) override;
  Result<TransferState> poll() override;
  bool cancel() noexcept override;
  std::string path() const override { return path_; }

 private:
  friend class MooncakeBackend;
  struct Batch {
    std::uint64_t id = Engine::kNoBatch;
    std::uint32_t count = 0, next = 0;  // tasks before `next` have ended
  };
  bool advance_locked();  // true when something ended or was started
  bool reap_locked();
  bool feed_locked();
  void settle_locked();
  void abandon_locked();
  void end_locked();
  Result<std::uint32_t> fill(int segment, std::uint32_t most);
  bool more_to_send() const noexcept { return rest_.length > 0 || !cursor_.at_end(); }
  Result<TransferState> answer() const;

  MooncakeBackend* const backend_;
  Line* const line_;
  Plan plan_;
  std::vector<const Cuts*> local_cuts_, remote_cuts_;  // by the plan's indices
  const std::string path_;

  PlanCursor cursor_;
  Piece rest_;  // of the piece last taken from the cursor
  std::vector<EngineRequest> requests_;
  std::vector<Batch> batches_;
  std::optional<std::string> message_;
  bool running_ = false, stopping_ = false;
  Nanoseconds failed_at_ = 0;
  std::optional<Error> error_ = Error{Code::kNotPosted, "never submitted"};
};

}  // namespace nixl::core::mooncake
