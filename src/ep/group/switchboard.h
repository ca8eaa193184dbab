// Switchboard: the sockets of one rank and the thread that listens on them. Callers wait here until a connect names
// them; the links of members stay here, silent, until they end.
//
// Every function may be called from any thread.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/fork.h"
#include "net/channel.h"
#include "net/wait.h"

namespace nixl::core::ep {

struct Link {
  int rank = -1;
  std::uint32_t incarnation = 0;
  pid_t pid = 0;
  net::Channel channel;
};

class Switchboard {
 public:
  static Result<std::unique_ptr<Switchboard>> open(int rank, std::uint32_t incarnation);
  ~Switchboard();

  const std::string& socket_name() const noexcept { return socket_name_; }

  // The rank that has called and waits to be named: its incarnation, or the link itself.
  std::optional<std::uint32_t> caller(int rank) const;
  std::optional<Link> take_caller(int rank);

  void keep(Link link);  // from now on the link of a member
  void drop(int rank);   // closes it
  bool alive(int rank);  // false: the member's link has ended, or there is none

  // Is woken when somebody has called. One waiter at a time.
  net::Wakeup& calls() noexcept { return calls_; }

 private:
  struct Stranger {  // has dialled and not yet said who it is
    Deadline deadline;
    pid_t pid;
    net::Channel channel;
  };

  Switchboard(int rank, std::uint32_t incarnation, net::Wakeup stop, net::Wakeup calls);
  void serve();
  void accept_strangers();
  void hear_strangers();
  void hear_callers();
  void welcome(Stranger& stranger, const std::string& hello);
  std::vector<pollfd> poll_list() const;

  const int rank_;
  const std::uint32_t incarnation_;
  std::string socket_name_;
  Fd listener_;
  ClosedInChildren listener_closed_in_children_;
  net::Wakeup stop_;
  net::Wakeup calls_;
  std::atomic<bool> stopping_{false};
  mutable std::mutex mutex_;  // guards the three lists
  std::vector<Stranger> strangers_;
  std::map<int, Link> callers_;
  std::map<int, Link> members_;
  std::thread thread_;
};

}  // namespace nixl::core::ep
