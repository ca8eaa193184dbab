// Messages through the lanes of a segment. LaneWriter is a sender's end of one lane in the peer's segment; LaneReader
// is the receiving end of all lanes of our own. Neither blocks; neither is thread-safe (the owner holds a lock).
#pragma once
#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "backends/samehost/segment.h"
#include "contract/backend.h"

namespace nixl::core::samehost {

class LaneWriter {
 public:
  // Claims a free lane of `peer`, or one whose sender is dead. kUnsupported when all are taken by living senders.
  // The writer refers to `peer`; move_to() tells it where the same mapping lives now.
  static Result<LaneWriter> claim(Segment& peer, std::string_view own_name);

  // Puts the message at the end of the queue and as much of the queue as fits into the lane.
  void send(std::string_view message);
  // At once and in one part, or not at all: nothing that anyone waits for.
  bool try_send(std::string_view payload, FrameKind kind) noexcept;
  // Moves queued parts into the lane; true when something moved.
  bool push();
  bool idle() const noexcept { return queue_.empty(); }
  // Hands the lane back; the receiver frees it after reading what is in it. The queue is dropped.
  void leave() noexcept;
  void move_to(Segment& peer) noexcept { peer_ = &peer; }

 private:
  LaneWriter(Segment& peer, std::uint32_t index) : peer_(&peer), index_(index) {}
  std::size_t room() const noexcept;
  void put(std::string_view payload, FrameKind kind) noexcept;

  Segment* peer_;
  std::uint32_t index_;
  struct Pending {
    std::string bytes;
    std::size_t sent = 0;
    FrameKind last = kLast;
  };
  std::deque<Pending> queue_;
};

class LaneReader {
 public:
  LaneReader(Segment& own, std::string own_name) : own_(&own), own_name_(std::move(own_name)), senders_(kNumLanes) {}
  bool has_news() const noexcept;
  // Appends whole messages that have arrived; true when a lane had anything.
  bool collect(std::vector<Notification>& out);
  // Offers of writes to be pulled, as they came; the oldest are kept, the others dropped.
  bool has_offers() const noexcept { return !offers_.empty(); }
  std::vector<std::string> take_offers() noexcept { return std::exchange(offers_, {}); }
  // Another agent than the one named in the constructor has opened a lane; stays true. Any thread.
  bool met_peer() const noexcept { return met_peer_.load(std::memory_order_relaxed); }

 private:
  struct Sender {
    std::string name;
    std::string partial;
  };
  void read_lane(std::uint32_t index, std::vector<Notification>& out);
  void take_frame(Sender& sender, FrameKind kind, std::string payload, std::vector<Notification>& out);

  Segment* own_;
  const std::string own_name_;
  std::vector<Sender> senders_;
  std::vector<std::string> offers_;
  std::atomic<bool> met_peer_{false};
};

}  // namespace nixl::core::samehost
