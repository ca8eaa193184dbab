// A transfer: writes and reads over the paths of a link; one of an agent with itself is copied.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backends/libfabric/link.h"
#include "backends/libfabric/regions.h"
#include "contract/plan_cursor.h"

namespace nixl::core::libfabric {

// What all transfers do alike: one job, under the engine's lock, with a state that anybody may look at.
class FabricTransfer : public Transfer, public LinkJob {
 public:
  using Wake = std::function<void()>;
  ~FabricTransfer() override;
  Result<TransferState> submit(std::optional<std::string_view> message) final;
  Result<TransferState> poll() final;
  bool cancel() noexcept final;

 protected:
  enum class State : int { kIdle, kRunning, kDone, kFailed };
  // `wake`: who sleeps must know of work that no event announces.
  FabricTransfer(Engine& engine, Plan plan, Wake wake)
      : engine_(&engine), door_(engine.mutex()), plan_(std::move(plan)), wake_(std::move(wake)), cursor_(plan_) {}

  virtual void start_locked(std::optional<std::string_view> message) = 0;
  // In flight is what cannot be stopped.
  virtual bool any_in_flight_locked() = 0;
  // Everything that was asked for is done.
  virtual bool complete_locked() const = 0;
  // Once, when it ends well.
  virtual Result<void> conclude_locked() { return {}; }
  virtual void leave_locked() {}

  State state() const noexcept { return state_.load(std::memory_order_acquire); }
  void fail_locked(Error error);
  void finish_if_ended_locked();

  Engine* const engine_;
  const std::shared_ptr<std::mutex> door_;  // of the engine, which may be gone before us
  const Plan plan_;
  const Wake wake_;
  PlanCursor cursor_;
  std::atomic<bool> failed_{false};

 private:
  Result<TransferState> answer() const;
  std::atomic<State> state_{State::kIdle};
  Error error_;  // valid once kFailed was seen
};

// Within one agent.
class OwnTransfer final : public FabricTransfer {
 public:
  OwnTransfer(Engine& engine, Plan plan, Wake wake) : FabricTransfer(engine, std::move(plan), std::move(wake)) {}
  std::string path() const override { return "memcpy"; }
  Next advance_locked() override;
  void completed_locked(const Operation&, long) override {}
  void link_up_locked() override {}
  void link_down_locked() override {}
  void link_lost_locked(const Error&) override {}
  void abandon_locked() override {}

 private:
  void start_locked(std::optional<std::string_view> message) override;
  bool any_in_flight_locked() override { return false; }
  bool complete_locked() const override { return cursor_.at_end(); }
};

// With a peer.
class PeerTransfer final : public FabricTransfer {
 public:
  PeerTransfer(Engine& engine, Link& link, Plan plan, std::string path, Wake wake)
      : FabricTransfer(engine, std::move(plan), std::move(wake)), link_(&link), path_(std::move(path)) {}
  std::string path() const override { return path_; }
  Next advance_locked() override;
  void completed_locked(const Operation& operation, long error) override;
  void link_up_locked() override;
  void link_down_locked() override;
  void link_lost_locked(const Error& why) override;
  void abandon_locked() override;

 private:
  void start_locked(std::optional<std::string_view> message) override;
  bool any_in_flight_locked() override;
  bool complete_locked() const override { return !restart_ && begun_ && cursor_.at_end() && piece_.length == 0; }
  Result<void> conclude_locked() override;
  void leave_locked() override;

  void begin_locked();
  void choose_paths_locked();
  bool check_regions_locked();
  Next issue_locked();
  long post_locked(const Link::Path& path, std::uint64_t length, Operation& operation);

  Link* const link_;
  const std::string path_;
  std::vector<const Link::Path*> paths_;
  std::size_t turn_ = 0;     // of the paths
  Piece piece_;              // what is left of the one at the cursor
  std::uint64_t share_ = 0;  // of it that one path takes
  std::uint64_t in_flight_ = 0;
  bool begun_ = false, restart_ = false;
  int num_restarts_ = 0;
  Nanoseconds lost_at_ = 0;
  std::optional<std::string> message_;
};

}  // namespace nixl::core::libfabric
