// Flag words, and when one is accepted. The rules are the same on every path; where a word lives is the path's
// business.
//
// A flag word says who sent and how often: the sender's incarnation and the count of operations it has sent to this
// very rank. Words are never reset while a pair is connected; each side of a pair keeps two (slot = count & 1), because
// a peer can be at most one operation ahead: it sends operation n+1 only after it has received n.
//
// A word is accepted when it equals what is expected. connect sets both counts to zero. After a mask the two sides of a
// pair may have counted differently; unmask takes the newest count found in the slots, and the operation after it
// accepts the next count. The peer may have been unmasked earlier and have sent already: that word is recognised by its
// session, the sender's number of unmasks of this rank, which travels beside the flag.
#pragma once
#include <cstdint>

#include "ep/layout/shape.h"

namespace nixl::core::ep {

using FlagWord = std::uint64_t;

NIXL_HD constexpr FlagWord make_flag(std::uint32_t incarnation, std::uint32_t count) {
  return static_cast<FlagWord>(incarnation) << 32 | count;
}
NIXL_HD constexpr std::uint32_t flag_incarnation(FlagWord word) {
  return static_cast<std::uint32_t>(word >> 32);
}
NIXL_HD constexpr std::uint32_t flag_count(FlagWord word) {
  return static_cast<std::uint32_t>(word);
}
NIXL_HD constexpr int flag_slot(std::uint32_t count) {
  return static_cast<int>(count & 1);
}
// Counts wrap around; two counts of a pair are never far apart.
NIXL_HD constexpr bool later(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::int32_t>(a - b) > 0;
}

// The newest count of this incarnation found in a peer's two slots; 0 when it has sent nothing yet.
NIXL_HD constexpr std::uint32_t newest_count(FlagWord slot0, FlagWord slot1, std::uint32_t incarnation) {
  const bool first = flag_incarnation(slot0) == incarnation;
  const bool second = flag_incarnation(slot1) == incarnation;
  if (first && second) return later(flag_count(slot0), flag_count(slot1)) ? flag_count(slot0) : flag_count(slot1);
  return first ? flag_count(slot0) : second ? flag_count(slot1) : 0;
}

// What a rank keeps of one peer. `sent` and `session` go out with its own flags, the rest judges the peer's.
struct PairState {
  std::uint32_t incarnation = 0;   // the peer's
  std::uint32_t sent = 0;          // operations sent to it
  std::uint32_t session = 0;       // times it was unmasked here
  std::uint32_t expected = 1;      // its count in the next operation
  std::uint32_t peer_session = 0;  // its session in the last accepted operation
  bool rejoining = false;          // unmasked, nothing accepted since

  NIXL_HD constexpr void connect(std::uint32_t peer_incarnation) {
    *this = PairState{};
    incarnation = peer_incarnation;
  }
  // `was_masked`: a peer that was in step stays so.
  NIXL_HD constexpr void unmask(bool was_masked, FlagWord slot0, FlagWord slot1) {
    ++session;
    if (!was_masked) return;
    expected = newest_count(slot0, slot1, incarnation) + 1;
    rejoining = true;
  }
};

enum class Verdict : int {
  kWait,      // not there yet
  kAccept,    // the word of this operation
  kMismatch,  // the peer is past this operation: it and this rank are not in step
};

// Judges the words of a peer for the operation in which `pair` expects it. On kAccept `count` is the accepted count.
// `session` is what came beside the flag in the slot of expected - 1; looked at only after an unmask.
NIXL_HD constexpr Verdict judge(const PairState& pair, FlagWord expected_slot, FlagWord other_slot,
                                std::uint32_t session, std::uint32_t* count) {
  *count = pair.expected;
  if (expected_slot == make_flag(pair.incarnation, pair.expected)) return Verdict::kAccept;
  if (pair.rejoining && other_slot == make_flag(pair.incarnation, pair.expected - 1) && pair.expected != 1 &&
      later(session, pair.peer_session)) {
    *count = pair.expected - 1;
    return Verdict::kAccept;
  }
  const bool same = flag_incarnation(expected_slot) == pair.incarnation;
  return same && later(flag_count(expected_slot), pair.expected) ? Verdict::kMismatch : Verdict::kWait;
}
NIXL_HD constexpr void accepted(PairState& pair, std::uint32_t count, std::uint32_t session) {
  pair.expected = count + 1;
  pair.peer_session = session;
  pair.rejoining = false;
}
// An operation that passed without the peer's word (masked, refused): the pair counts on, so that a slow peer's word of
// this operation is never taken for the next one's.
NIXL_HD constexpr void missed(PairState& pair) {
  ++pair.expected;
  pair.rejoining = false;
}

}  // namespace nixl::core::ep
