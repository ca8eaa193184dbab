// PostOffice: where other agents' messages come in. One thread takes callers and what they send; nobody's silence holds up another.
#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "backends/mooncake/wire.h"
#include "base/clock.h"
#include "net/channel.h"
#include "net/wait.h"

namespace nixl::core::mooncake {

class PostOffice {
 public:
  // Listens on a free port of `address`. `news` is woken when a message has come; it outlives the office.
  static Result<std::unique_ptr<PostOffice>> open(const std::string& address, std::uint64_t incarnation,
                                                  net::Wakeup& news);
  ~PostOffice();  // says goodbye to all callers
  std::uint16_t port() const noexcept { return port_; }
  void drain(std::vector<Notification>& out);
  bool empty() const;
  // Waits until no caller of this incarnation is connected: all that it has sent is in drain() then.
  void wait_for_end(std::uint64_t incarnation, Deadline deadline);

 private:
  struct Caller {
    net::Channel channel;
    std::string name;  // empty: has not said hello
    std::uint64_t incarnation = 0;
    Deadline patience;  // for the hello
    bool more = false;  // frames wait that poll() does not see
  };
  PostOffice(Fd socket, std::uint16_t port, std::uint64_t incarnation, net::Wakeup stop, net::Wakeup& news)
      : socket_(std::move(socket)),
        port_(port),
        incarnation_(incarnation),
        stop_(std::move(stop)),
        news_(news),
        closed_in_children_(socket_.get()) {}
  void loop();
  void accept_all();
  void dismiss(std::unique_ptr<Caller>& caller);
  bool receive(Caller& caller);  // false: it is over with this one
  bool greet(Caller& caller, std::string_view frame);

  Fd socket_;
  const std::uint16_t port_;
  const std::uint64_t incarnation_;
  net::Wakeup stop_;
  net::Wakeup& news_;
  ClosedInChildren closed_in_children_;
  std::vector<std::unique_ptr<Caller>> callers_;
  Deadline no_callers_before_ = Deadline::passed_already();  // there was no descriptor for one
  mutable std::mutex mutex_;
  std::condition_variable ended_;
  std::vector<Notification> inbox_;
  std::multiset<std::uint64_t> connected_;  // incarnations of those who have said hello
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace nixl::core::mooncake
