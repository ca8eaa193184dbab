// Flag words, and when one is accepted. The rules are the same on every path; where a word lives is the path's
// business.
//
// A flag word says who sent and how often: the sender's incarnation and the count of operations it has sent to this
// very rank. Words are never reset while a pair is connected; each side of a pair keeps two (slot = count & 1), because
// a peer can be at most one operation ahead: it sends operation n+1 only after it has received n.
//
// A word is accepted when it equals what is expected. connect sets both counts to zero. After a mask the two sides of a
// pair may have counted differently; unmask expects the count after the newest one found in the slots. A peer that was
// unmasked earlier may have sent already: beside each flag travels the count that its sender awaits in the same
// operation, so a message that awaits this rank's next count is the operation to come and not a leftover.
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

// The newest message of a peer, as a rank finds it when it unmasks that peer.
struct NewestMessage {
  std::uint32_t count = 0;   // its newest_count; 0: nothing yet
  std::uint32_t awaits = 0;  // this rank's count that its sender expects in the same operation
  bool stands = false;       // it is whole, and was not taken back
};
// The count to expect of a peer that is unmasked. `next_sent`: this rank's count to it in its next operation. A message that
// awaits this very count belongs to that operation; any other is a leftover.
NIXL_HD constexpr std::uint32_t expected_after(const NewestMessage& newest, std::uint32_t next_sent) {
  const bool to_come = newest.count != 0 && newest.stands && newest.awaits == next_sent;
  return to_come ? newest.count : newest.count + 1;
}

// What a rank keeps of one peer.
struct PairState {
  std::uint32_t incarnation = 0;  // the peer's
  std::uint32_t sent = 0;         // operations sent to it
  std::uint32_t expected = 1;     // its count in the next operation; travels beside this rank's own flag

  NIXL_HD constexpr void connect(std::uint32_t peer_incarnation) {
    *this = PairState{};
    incarnation = peer_incarnation;
  }
  // Not while an operation with the peer is under way, unless it was masked.
  NIXL_HD constexpr void unmask(const NewestMessage& newest) { expected = expected_after(newest, sent + 1); }
  // An operation has passed, with the peer's word or without it: a late word of it is never taken for the next one's.
  NIXL_HD constexpr void pass() { ++expected; }
};

enum class Verdict : int {
  kWait,      // not there yet
  kAccept,    // the word of this operation
  kMismatch,  // the peer is past this operation: it and this rank are not in step
};

// Judges the word in the slot of `pair.expected`.
NIXL_HD constexpr Verdict judge(const PairState& pair, FlagWord word) {
  if (word == make_flag(pair.incarnation, pair.expected)) return Verdict::kAccept;
  const bool same = flag_incarnation(word) == pair.incarnation;
  return same && later(flag_count(word), pair.expected) ? Verdict::kMismatch : Verdict::kWait;
}

}  // namespace nixl::core::ep
