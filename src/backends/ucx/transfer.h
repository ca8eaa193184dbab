// A transfer over one link: WRITE as puts and a flush, READ as gets, or, where no transport can fetch, as requests that
// the owner of the memory answers by putting.
#pragma once
#include <atomic>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "backends/ucx/link.h"
#include "backends/ucx/regions.h"
#include "contract/backend.h"
#include "contract/plan_cursor.h"

namespace nixl::core::ucx {

class ReadRequests;

// A region registered here, as the agent holds it.
class Registered final : public LocalRegion {
 public:
  Registered(std::shared_ptr<Exposed> exposed, std::function<void(Exposed&)> on_release, std::uint64_t device)
      : exposed_(std::move(exposed)), on_release_(std::move(on_release)), device_(device) {}
  ~Registered() override { on_release_(*exposed_); }
  Exposed& exposed() const noexcept { return *exposed_; }
  std::uint64_t device() const noexcept { return device_; }

 private:
  std::shared_ptr<Exposed> exposed_;
  std::function<void(Exposed&)> on_release_;
  const std::uint64_t device_;
};

// What the lanes of one transfer know of each other: the last one to end sends the message, if all of them succeeded.
struct Shares {
  std::atomic<int> running{0};
  std::atomic<bool> failed{false};
};

// One share of a transfer: the pieces that go over one link. The worker's lock guards everything but state().
class Lane final : public Job {
 public:
  // `shares` outlives the lane, and is set anew before the lanes are started.
  Lane(Plan plan, Link& link, ReadRequests& requests, Shares& shares, std::uint64_t caller_incarnation);
  ~Lane() override = default;

  enum class State : int { kIdle, kRunning, kDone, kFailed };
  State state() const noexcept { return state_.load(std::memory_order_acquire); }
  const Error& error() const noexcept { return error_; }  // valid once kFailed was seen

  void start_locked(std::optional<std::string_view> message);
  bool cancel_locked();  // true when it ended; otherwise operations are in flight
  Link& link() const noexcept { return *link_; }
  const Plan& plan() const noexcept { return plan_; }

  // The owner of the memory answered a part of a READ.
  void answered_locked(const ReadDone& done);

  bool advance_locked() override;
  void completed_locked(ucs_status_t status) override;
  void link_up_locked() override;
  void link_down_locked() override;
  void link_lost_locked(const Error& why) override;
  void abandon_locked() override;

 private:
  void begin_locked();
  bool issue_locked();
  bool issue_requests_locked();
  void note_locked(Error error);  // an operation failed: perhaps because the link did
  void fail_locked(Error error);
  void finish_if_ended_locked();
  Registered& local(std::uint32_t index) const { return static_cast<Registered&>(*plan_.local_regions[index]); }
  Imported& remote(std::uint32_t index) const { return static_cast<Imported&>(*plan_.remote_regions[index]); }

  const Plan plan_;
  Link* const link_;
  ReadRequests* const requests_;
  Shares* const shares_;
  const std::uint64_t caller_incarnation_;
  const bool by_request_;
  std::vector<ucp_rkey_h> keys_;  // by remote region, of the present endpoint

  std::atomic<State> state_{State::kIdle};
  PlanCursor cursor_;
  Error error_;
  std::optional<Error> suspect_;
  bool failed_ = false, restart_ = false, flushed_ = false, abandoned_ = false;
  int in_flight_ = 0;   // operations of UCX
  int unanswered_ = 0;  // read requests
  std::vector<std::uint64_t> request_ids_;
  std::optional<std::string> message_;
};

// Read requests waiting for their answers, by id. One a worker, under its lock.
class ReadRequests {
 public:
  std::uint64_t open(Lane& lane) {
    lanes_.emplace(++last_, &lane);
    return last_;
  }
  Lane* close(std::uint64_t id) {
    const auto found = lanes_.find(id);
    if (found == lanes_.end()) return nullptr;
    Lane* const lane = found->second;
    lanes_.erase(found);
    return lane;
  }

 private:
  std::map<std::uint64_t, Lane*> lanes_;
  std::uint64_t last_ = 0;
};

}  // namespace nixl::core::ucx
