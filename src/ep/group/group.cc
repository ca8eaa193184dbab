#include "ep/group/group.h"

#include <algorithm>
#include <chrono>
#include <set>

namespace nixl::core::ep {
namespace {

// Waits under `lock` until `done` or the deadline; false: the deadline passed.
template <typename Done>
bool wait_until(std::condition_variable& changed, std::unique_lock<std::mutex>& lock, Deadline deadline, Done done) {
  while (!done()) {
    if (deadline.passed()) return false;
    changed.wait_for(lock, std::chrono::nanoseconds(std::min<Nanoseconds>(deadline.left(), 1'000'000'000)));
  }
  return true;
}

}  // namespace

Result<std::unique_ptr<Group>> Group::open(const GroupOptions& options, PeerMemory& memory) {
  NIXL_ASSIGN(auto board, Switchboard::open(options.rank, options.incarnation));
  return std::unique_ptr<Group>(new Group(options, memory, std::move(board)));
}

Group::Group(const GroupOptions& options, PeerMemory& memory, std::unique_ptr<Switchboard> board)
    : options_(options), memory_(memory), board_(std::move(board)) {}

Group::~Group() {
  close();
}

void Group::set_store(std::shared_ptr<Store> store) {
  const std::lock_guard lock(mutex_);
  store_.swap(store);  // the one before goes behind the lock
}

Result<std::vector<int>> Group::connect(const std::vector<int>& ranks) {
  const Deadline deadline = Deadline::after(options_.connect_timeout_ns);
  {
    std::unique_lock lock(mutex_);
    if (connects_here_locked())
      return fail(Code::kNotAllowed,
                  "this thread is inside a connect of the same buffer: a store, or a signal handler "
                  "that ran in it, cannot begin another one");
    if (!wait_until(changed_, lock, deadline, [&] { return !connecting_ || closing_; }))
      return fail(Code::kTimeout,
                  "another connect of this buffer is still running after %lld ms "
                  "(NIXL_EP_CONNECT_TIMEOUT_MS)",
                  static_cast<long long>(options_.connect_timeout_ns / 1'000'000));
    if (closing_) return fail(Code::kCancelled, "connect was cancelled: the buffer is being destroyed");
    connecting_ = true;
    connecting_thread_ = std::this_thread::get_id();
  }
  auto connected = connect_in_turn(ranks, deadline);
  {
    const std::lock_guard lock(mutex_);
    connecting_ = false;
  }
  changed_.notify_all();
  return connected;
}

Result<std::vector<int>> Group::connect_in_turn(const std::vector<int>& ranks, Deadline deadline) {
  NIXL_ASSIGN(std::vector<int> targets, choose_targets(ranks, deadline));
  if (targets.empty()) return targets;
  std::shared_ptr<Store> store;
  {
    const std::lock_guard lock(mutex_);
    store = store_;
  }
  if (!store)
    return fail(Code::kNotAllowed,
                "no store to meet rank %d in: pass tcp_store_group= or call set_tcp_store_group first, or "
                "set NIXL_ETCD_ENDPOINTS",
                targets.front());
  Attempt attempt({options_, memory_, *board_, *store, closing_}, targets, deadline);
  NIXL_ASSIGN(const std::vector<PeerIdentity> peers, attempt.run());
  const std::lock_guard lock(mutex_);
  for (const PeerIdentity& peer : peers) members_[peer.rank] = {peer.incarnation, false};
  return targets;
}

Result<std::vector<int>> Group::choose_targets(const std::vector<int>& ranks, Deadline deadline) {
  std::vector<int> targets;
  for (int rank : std::set<int>(ranks.begin(), ranks.end())) {
    if (rank == options_.rank) continue;
    std::unique_lock lock(mutex_);
    const bool settled = wait_until(changed_, lock, deadline, [&] {
      const auto found = members_.find(rank);
      return found == members_.end() || !found->second.leaving;
    });
    if (!settled)
      return fail(Code::kTimeout, "rank %d is still being disconnected: operations that use it do not end", rank);
    if (const auto member = members_.find(rank); member != members_.end()) {
      const auto caller = board_->caller(rank);
      const bool replaced = caller && *caller != member->second.incarnation;
      if (board_->alive(rank) && !replaced) continue;
      member->second.leaving = true;
      lock.unlock();
      NIXL_TRY(release(rank));
    }
    targets.push_back(rank);
  }
  return targets;
}

Result<void> Group::disconnect(const std::vector<int>& ranks) {
  const std::set<int> leaving(ranks.begin(), ranks.end());
  {
    const std::lock_guard lock(mutex_);
    for (int rank : leaving) {
      const auto found = members_.find(rank);
      if (found == members_.end() || found->second.leaving)
        return fail(Code::kInvalidArgument, "rank %d is not connected%s; nothing was disconnected", rank,
                    rank == options_.rank ? " (it is this rank itself)" : "");
    }
    for (int rank : leaving) members_[rank].leaving = true;
  }
  Result<void> all;
  for (int rank : leaving)
    if (auto done = release(rank); !done) all = std::move(done);
  return all;
}

Result<void> Group::release(int rank) {
  auto done = memory_.detach(rank);
  board_->drop(rank);
  {
    const std::lock_guard lock(mutex_);
    members_.erase(rank);
  }
  changed_.notify_all();
  if (!done) return fail(within("disconnect of rank " + std::to_string(rank), std::move(done).error()));
  return done;
}

std::vector<int> Group::members() const {
  const std::lock_guard lock(mutex_);
  std::vector<int> ranks;
  for (const auto& [rank, member] : members_)
    if (!member.leaving) ranks.push_back(rank);
  return ranks;
}

bool Group::has(int rank) const {
  const std::lock_guard lock(mutex_);
  const auto found = members_.find(rank);
  return found != members_.end() && !found->second.leaving;
}

bool Group::connects_here_locked() const {
  return connecting_ && connecting_thread_ == std::this_thread::get_id();
}

bool Group::cancel_connect_here() {
  const std::lock_guard lock(mutex_);
  if (connects_here_locked()) closing_ = true;
  return connects_here_locked();
}

void Group::close() {
  if (!board_) return;
  closing_ = true;
  board_->calls().wake();
  std::unique_lock lock(mutex_);
  changed_.notify_all();
  changed_.wait(lock, [&] { return !connecting_; });
  members_.clear();
  lock.unlock();
  board_.reset();
}

}  // namespace nixl::core::ep
