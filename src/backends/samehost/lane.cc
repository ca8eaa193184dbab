#include "backends/samehost/lane.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace nixl::core::samehost {
namespace {

constexpr std::uint64_t kLeaving = 1;
constexpr std::size_t rounded(std::size_t bytes) {
  return (bytes + 7) & ~std::size_t{7};
}
constexpr std::size_t kMaxOffers = 64;  // what is not taken is pushed all the same
constexpr std::size_t kMaxPart = kLaneBytes / 2 - sizeof(FrameHeader);

bool owner_is_dead(std::uint64_t owner) {
  return ::kill(static_cast<pid_t>(owner >> 32), 0) != 0 && errno == ESRCH;
}

std::uint64_t new_owner_word() {
  static std::atomic<std::uint32_t> next{1};
  const std::uint64_t tag = next.fetch_add(1, std::memory_order_relaxed) & 0x7fffffffu;
  return static_cast<std::uint64_t>(::getpid()) << 32 | tag << 1;
}

void copy_in(char* ring, std::uint64_t at, const void* from, std::size_t bytes) noexcept {
  const std::size_t start = at % kLaneBytes, first = std::min(bytes, kLaneBytes - start);
  std::memcpy(ring + start, from, first);
  std::memcpy(ring, static_cast<const char*>(from) + first, bytes - first);
}

void copy_out(const char* ring, std::uint64_t at, void* to, std::size_t bytes) noexcept {
  const std::size_t start = at % kLaneBytes, first = std::min(bytes, kLaneBytes - start);
  std::memcpy(to, ring + start, first);
  std::memcpy(static_cast<char*>(to) + first, ring, bytes - first);
}

}  // namespace

Result<LaneWriter> LaneWriter::claim(Segment& peer, std::string_view own_name) {
  if (own_name.size() > kMaxPart)
    return fail(Code::kUnsupported, "an agent name of %zu bytes; at most %zu cross to a peer of this host",
                own_name.size(), kMaxPart);
  const std::uint64_t mine = new_owner_word();
  for (const bool take_dead : {false, true}) {
    for (std::uint32_t index = 0; index < kNumLanes; ++index) {
      std::uint64_t owner = peer.lane(index).owner.load(std::memory_order_acquire);
      // A leaving sender's lane still belongs to the receiver, unless that sender is dead and cannot finish leaving.
      if (owner != 0 && !(take_dead && owner_is_dead(owner))) continue;
      if (!peer.lane(index).owner.compare_exchange_strong(owner, mine, std::memory_order_acq_rel)) continue;
      LaneWriter writer(peer, index);
      writer.queue_.push_back({std::string(own_name), 0, kHello});
      writer.push();
      return writer;
    }
  }
  return fail(Code::kUnsupported, "all %u message lanes of the peer are taken by living processes", kNumLanes);
}

std::size_t LaneWriter::room() const noexcept {
  const LaneHeader& lane = peer_->lane(index_);
  const std::uint64_t used = lane.tail.load(std::memory_order_relaxed) - lane.head.load(std::memory_order_acquire);
  return used > kLaneBytes ? 0 : kLaneBytes - used;  // a peer that writes nonsense into `head` gets no more messages
}

void LaneWriter::put(std::string_view payload, FrameKind kind) noexcept {
  LaneHeader& lane = peer_->lane(index_);
  char* const ring = peer_->lane_data(index_);
  const std::uint64_t tail = lane.tail.load(std::memory_order_relaxed);
  const FrameHeader frame{static_cast<std::uint32_t>(payload.size()), kind};
  copy_in(ring, tail, &frame, sizeof frame);
  copy_in(ring, tail + sizeof frame, payload.data(), payload.size());
  lane.tail.store(tail + sizeof frame + rounded(payload.size()), std::memory_order_release);
  peer_->header().dirty[index_ / 64].fetch_or(std::uint64_t{1} << index_ % 64, std::memory_order_seq_cst);
}

void LaneWriter::send(std::string_view message) {
  if (queue_.empty() && message.size() <= kMaxPart && room() >= sizeof(FrameHeader) + rounded(message.size())) {
    put(message, kLast);
    return;
  }
  queue_.push_back({std::string(message), 0, kLast});
  push();
}

bool LaneWriter::try_send(std::string_view payload, FrameKind kind) noexcept {
  if (!queue_.empty() || payload.size() > kMaxPart || room() < sizeof(FrameHeader) + rounded(payload.size()))
    return false;
  put(payload, kind);
  return true;
}

bool LaneWriter::push() {
  bool moved = false;
  while (!queue_.empty()) {
    Pending& front = queue_.front();
    const std::size_t part = std::min(front.bytes.size() - front.sent, kMaxPart);
    if (room() < sizeof(FrameHeader) + rounded(part)) break;
    const bool whole = front.sent + part == front.bytes.size();
    put(std::string_view(front.bytes).substr(front.sent, part), whole ? front.last : kPart);
    front.sent += part;
    moved = true;
    if (whole) queue_.pop_front();
  }
  return moved;
}

void LaneWriter::leave() noexcept {
  // A forked child drops copies of what its parent goes on using.
  if (peer_->lane(index_).owner.load(std::memory_order_acquire) >> 32 != static_cast<std::uint64_t>(::getpid())) return;
  peer_->lane(index_).owner.fetch_or(kLeaving, std::memory_order_acq_rel);
  peer_->header().dirty[index_ / 64].fetch_or(std::uint64_t{1} << index_ % 64, std::memory_order_seq_cst);
}

bool LaneReader::has_news() const noexcept {
  for (const auto& word : own_->header().dirty)
    if (word.load(std::memory_order_seq_cst) != 0) return true;
  return false;
}

bool LaneReader::collect(std::vector<Notification>& out) {
  bool any = false;
  for (std::uint32_t word = 0; word < kNumLanes / 64; ++word) {
    auto& dirty = own_->header().dirty[word];
    if (dirty.load(std::memory_order_relaxed) == 0) continue;
    for (std::uint64_t bits = dirty.exchange(0, std::memory_order_seq_cst); bits != 0; bits &= bits - 1)
      read_lane(word * 64 + static_cast<std::uint32_t>(__builtin_ctzll(bits)), out);
    any = true;
  }
  return any;
}

void LaneReader::read_lane(std::uint32_t index, std::vector<Notification>& out) {
  LaneHeader& lane = own_->lane(index);
  const char* const ring = own_->lane_data(index);
  std::uint64_t owner = lane.owner.load(std::memory_order_acquire);
  std::uint64_t head = lane.head.load(std::memory_order_relaxed);
  const std::uint64_t tail = lane.tail.load(std::memory_order_acquire);
  while (head != tail) {
    FrameHeader frame;
    copy_out(ring, head, &frame, sizeof frame);
    const std::uint64_t end = head + sizeof frame + rounded(frame.bytes);
    // Only a sender that tramples its own lane can be inconsistent here; what it sent is dropped.
    if (tail - head > kLaneBytes || frame.bytes > kMaxPart || end > tail) {
      head = tail;
      senders_[index] = {};
      break;
    }
    std::string payload(frame.bytes, '\0');
    copy_out(ring, head + sizeof frame, payload.data(), payload.size());
    take_frame(senders_[index], static_cast<FrameKind>(frame.kind), std::move(payload), out);
    head = end;
    lane.head.store(head, std::memory_order_release);
  }
  lane.head.store(head, std::memory_order_release);
  if (owner & kLeaving) {
    senders_[index] = {};
    lane.owner.compare_exchange_strong(owner, 0, std::memory_order_acq_rel);
  }
}

void LaneReader::take_frame(Sender& sender, FrameKind kind, std::string payload, std::vector<Notification>& out) {
  switch (kind) {
    case kHello:
      sender = {std::move(payload), {}};
      if (sender.name != own_name_) met_peer_.store(true, std::memory_order_relaxed);
      return;
    case kPart:
      sender.partial += payload;
      return;
    case kLast:
      if (sender.partial.empty()) {
        out.push_back({sender.name, std::move(payload)});
      } else {
        sender.partial += payload;
        out.push_back({sender.name, std::exchange(sender.partial, {})});
      }
      return;
    case kOffer:
      if (offers_.size() < kMaxOffers) offers_.push_back(std::move(payload));
      return;
  }
}

}  // namespace nixl::core::samehost
