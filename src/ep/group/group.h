// Group: who is in. Connects and disconnects this rank with others, pair by pair; owns the sockets and the links.
//
// Threads: every function may be called from any thread; one connect runs at a time, a second one waits within its
// deadline. The memory must outlive the group; the group calls attach and detach from the threads that call connect and
// disconnect.
#pragma once
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "contract/store.h"
#include "ep/group/attempt.h"
#include "ep/group/switchboard.h"
#include "ep/path.h"

namespace nixl::core::ep {

class Group {
 public:
  // Binds the sockets and starts the thread that listens on them.
  static Result<std::unique_ptr<Group>> open(const GroupOptions& options, PeerMemory& memory);
  ~Group();  // as close()

  // For coming connects; null: none.
  void set_store(std::shared_ptr<Store> store);

  // Returns the ranks that were connected by this call (all masked by the path): those of `ranks` that are neither this
  // rank nor members with a living link. All or nothing. A listed member that is gone is disconnected first, whatever
  // follows.
  Result<std::vector<int>> connect(const std::vector<int>& ranks);

  // Every rank must be a member. Returns when running operations have passed them and their memory is released.
  Result<void> disconnect(const std::vector<int>& ranks);

  std::vector<int> members() const;  // ascending, without this rank
  bool has(int rank) const;

  // When this thread is inside connect (in its store): cancels that connect, which ends once the store returns. False
  // otherwise.
  bool cancel_connect_here();
  // Not inside connect. Cancels a running connect and waits for it; ends all links. Memory stays attached: it goes with its path.
  void close();

 private:
  struct Member {
    std::uint32_t incarnation = 0;
    bool leaving = false;
  };

  Group(const GroupOptions& options, PeerMemory& memory, std::unique_ptr<Switchboard> board);
  Result<std::vector<int>> connect_in_turn(const std::vector<int>& ranks, Deadline deadline);
  Result<std::vector<int>> choose_targets(const std::vector<int>& ranks, Deadline deadline);
  Result<void> release(int rank);
  bool connects_here_locked() const;

  const GroupOptions options_;
  PeerMemory& memory_;
  std::unique_ptr<Switchboard> board_;
  std::atomic<bool> closing_{false};
  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::shared_ptr<Store> store_;
  std::map<int, Member> members_;
  bool connecting_ = false;
  std::thread::id connecting_thread_;
};

}  // namespace nixl::core::ep
