// Our end of the messages: the own segment, the doorbell that wakes its owner, and the way to ring another's.
#pragma once
#include <sys/socket.h>
#include <sys/un.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/samehost/lane.h"
#include "backends/samehost/segment.h"
#include "base/fd.h"
#include "base/result.h"

namespace nixl::core::samehost {

// An abstract datagram socket's address.
struct Doorbell {
  sockaddr_un address{};
  socklen_t bytes = 0;
  static Doorbell named(const std::string& name) noexcept;
};

// Thread-safe; shared with jobs that may end after the backend.
class Mailbox {
 public:
  static Result<std::shared_ptr<Mailbox>> open(std::uint64_t incarnation, const std::string& own_name);

  Segment& segment() noexcept { return segment_; }
  int socket() const noexcept { return socket_.get(); }
  const std::string& doorbell_name() const noexcept { return name_; }
  // The bytes by which peers find this process; set once, before anything is connected.
  const std::string& address() const noexcept { return address_; }
  void set_address(std::string address) noexcept { address_ = std::move(address); }

  // Wakes the owner of `segment` if it sleeps. Call after putting something into one of its lanes.
  void ring(Segment& segment, const Doorbell& doorbell) noexcept;
  void ring_own() noexcept { ring(segment_, own_); }
  // Says that the owner is about to sleep on socket(); false: there is news already.
  bool arm() noexcept;
  void silence() noexcept;  // eats the bytes of the doorbell
  // From now on senders write to this eventfd of ours when callers may sleep on it: after each drain().
  void share_callers_event(int eventfd) noexcept;

  // Moves arrived messages aside; true when there were any.
  bool collect();
  // Some other agent of this host has connected to us; stays true.
  bool met_peer() const noexcept { return reader_.met_peer(); }
  // Offers of pulled writes that have arrived.
  bool has_offers() const noexcept { return has_offers_.load(std::memory_order_acquire); }
  std::vector<std::string> take_offers();
  // Collects, and appends all messages set aside.
  void drain(std::vector<Notification>& out);

 private:
  void arm_callers() noexcept;
  bool collect_locked();
  Mailbox(Segment segment, const std::string& own_name) : segment_(std::move(segment)), reader_(segment_, own_name) {}

  Segment segment_;
  Fd socket_;
  std::string name_, address_;
  Doorbell own_;
  std::mutex mutex_;
  LaneReader reader_;
  std::vector<Notification> arrived_;
  std::atomic<bool> has_offers_{false};
  std::size_t num_callers_events_ = 0;  // more than fit into the header: none is used
};

}  // namespace nixl::core::samehost
