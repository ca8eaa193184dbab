// What a rank of the CUDA path knows of a peer from an operation on, and every decision that changes it. Pure: kernels
// load and store these words, the test drives them on the host.
#pragma once
#include <cstdint>

#include "ep/layout/wire.h"

namespace nixl::core::ep {

enum class PeerStatus : std::uint32_t { kActive = 0, kMasked = 1, kAbsent = 2 };

// Valid from operation `from` on. Two versions of a peer exist: the one that a running operation uses stays untouched
// while a change for the next operation is written to the other.
struct alignas(64) PeerVersion {
  std::uint64_t from = ~0ull;       // ~0: not in use
  std::uint8_t* data = nullptr;     // its data memory, mapped here
  std::uint8_t* control = nullptr;  // its control memory
  PeerStatus status = PeerStatus::kAbsent;
  std::uint32_t incarnation = 0;
  std::uint32_t sent = 0;      // count that operation `from` sends
  std::uint32_t expected = 0;  // count that operation `from` waits for
  std::uint32_t unused[6] = {};
};
static_assert(sizeof(PeerVersion) == 64);

// The same in four cells of 16 bytes, each of which is read and written whole and carries the epoch in which it was written. So
// they can be read before it is known which epoch it is: a mixture shows.
struct alignas(16) PeerCell {
  std::uint32_t low, high, epoch, word;
};
struct PeerCells {
  PeerCell cells[4];
  NIXL_HD constexpr bool of(std::uint32_t epoch) const {
    return cells[0].epoch == epoch && cells[1].epoch == epoch && cells[2].epoch == epoch && cells[3].epoch == epoch;
  }
};
NIXL_HD inline PeerCells cells_of(const PeerVersion& version, std::uint32_t epoch) {
  const auto cell = [epoch](std::uint64_t wide, std::uint32_t word) {
    return PeerCell{static_cast<std::uint32_t>(wide), static_cast<std::uint32_t>(wide >> 32), epoch, word};
  };
  return {{cell(reinterpret_cast<std::uint64_t>(version.data), static_cast<std::uint32_t>(version.status)),
           cell(reinterpret_cast<std::uint64_t>(version.control), version.incarnation),
           cell(version.from, version.sent), cell(version.expected, 0)}};
}
NIXL_HD inline PeerVersion version_of(const PeerCells& from) {
  const auto wide = [&](int i) { return std::uint64_t{from.cells[i].high} << 32 | from.cells[i].low; };
  PeerVersion version;
  version.from = wide(2);
  version.data = reinterpret_cast<std::uint8_t*>(wide(0));
  version.control = reinterpret_cast<std::uint8_t*>(wide(1));
  version.status = static_cast<PeerStatus>(from.cells[0].word);
  version.incarnation = from.cells[1].word;
  version.sent = from.cells[2].word;
  version.expected = from.cells[3].low;
  return version;
}

// What a rank writes into a peer's control memory in every operation, in the slot of its count.
struct PushHeader {
  std::uint32_t incarnation = 0;  // of the sender
  std::uint32_t count = 0;
  std::uint32_t awaits = 0;  // the peer's count that the sender waits for in this operation
  std::uint32_t word = 0;    // messages, and these:
};
inline constexpr std::uint32_t kHeaderParity = 1u << 31;  // of the sender's operation number
inline constexpr std::uint32_t kUnknownParity = 2;
inline constexpr std::uint32_t kHeaderWithdrawn = 1u
                                                  << 30;  // taken back: the sender masked this rank in that operation

NIXL_HD constexpr std::uint32_t sent_in(const PeerVersion& version, std::uint64_t number) {
  return version.sent + static_cast<std::uint32_t>(number - version.from);
}
NIXL_HD constexpr std::uint32_t expected_in(const PeerVersion& version, std::uint64_t number) {
  return version.expected + static_cast<std::uint32_t>(number - version.from);
}
// Whether a header is the one that operation `number` waits for.
NIXL_HD constexpr bool names_operation(const PushHeader& header, const PeerVersion& version, std::uint64_t number) {
  return header.incarnation == version.incarnation && header.count == expected_in(version, number);
}

// Whether the header in the slot of operation `number` says that the peer will not take part in it: it took its message
// back, as it gave this rank up, or is past that operation.
NIXL_HD constexpr bool is_past(const PushHeader& header, const PeerVersion& version, std::uint64_t number) {
  if (header.incarnation != version.incarnation) return false;
  return names_operation(header, version, number) ? (header.word & kHeaderWithdrawn) != 0
                                                  : later(header.count, expected_in(version, number));
}

// What the header of the operation before tells, where that one was an operation of the pair too (`fresh`: it was not, the peer was
// connected or unmasked since).
struct HeaderBefore {
  PushHeader header;
  std::uint32_t incarnation = 0, expected = 0;  // of the peer now
  bool fresh = false;

  NIXL_HD constexpr bool names_it() const {
    return !fresh && header.incarnation == incarnation && header.count == expected - 1;
  }
  // The peer gave this rank up in that operation, after it had been heard: it will not come to this one.
  NIXL_HD constexpr bool withdrawn() const { return names_it() && (header.word & kHeaderWithdrawn) != 0; }
  // The parity of the peer's number of this operation: one more than that of the one before.
  NIXL_HD constexpr std::uint32_t parity() const {
    const bool known = names_it() && (header.word & kHeaderWithdrawn) == 0;
    return known ? header.word >> 31 ^ 1 : kUnknownParity;
  }
};

// Of two versions the one that holds for operation `number`.
NIXL_HD constexpr PeerVersion version_for(const PeerVersion& a, const PeerVersion& b, std::uint64_t number) {
  const bool second = a.from > number || (b.from <= number && b.from >= a.from);
  PeerVersion v;  // field by field: a choice between addresses would put both into a kernel's memory
  v.from = second ? b.from : a.from;
  v.data = second ? b.data : a.data;
  v.control = second ? b.control : a.control;
  v.status = second ? b.status : a.status;
  v.incarnation = second ? b.incarnation : a.incarnation;
  v.sent = second ? b.sent : a.sent;
  v.expected = second ? b.expected : a.expected;
  return v;
}
// Which of two versions a change from operation `from` on replaces: never the one that the operation before it uses.
NIXL_HD constexpr int place_for(std::uint64_t a, std::uint64_t b, std::uint64_t from) {
  if (a == from || b == from) return a == from ? 0 : 1;
  if (a == ~0ull || b == ~0ull) return a == ~0ull ? 0 : 1;
  return a < b ? 0 : 1;
}
// The newest version, as it stands before operation `next`. A masked peer is sent nothing, so its counts stand still.
NIXL_HD constexpr PeerVersion advanced(const PeerVersion& version, std::uint64_t next) {
  PeerVersion now = version;
  if (now.status == PeerStatus::kActive) {
    now.sent = sent_in(now, next);
    now.expected = expected_in(now, next);
  }
  now.from = next;
  return now;
}

// Counts of a connection begin after every count that this rank has ever sent to anybody: counts make the tags of
// lines, and lines of an earlier connection between the same two incarnations still lie in memory. A rank tells it with
// its memory.
NIXL_HD constexpr std::uint32_t first_count(std::uint64_t operations_begun) {
  return static_cast<std::uint32_t>(operations_begun) + 1;
}
NIXL_HD constexpr PeerVersion connected(std::uint64_t next, std::uint32_t incarnation, std::uint32_t first_sent,
                                        std::uint32_t first_expected) {
  PeerVersion version;
  version.from = next;
  version.status = PeerStatus::kMasked;
  version.incarnation = incarnation;
  version.sent = first_sent;
  version.expected = first_expected;
  return version;
}
// What a new connection leaves in the slot of `first_expected - 1`; the other slot is zeroed.
NIXL_HD constexpr PushHeader header_before(std::uint32_t incarnation, std::uint32_t first_expected) {
  return {incarnation, first_expected - 1, 0, kHeaderWithdrawn};
}

// slot0, slot1: the peer's headers in this rank's control memory.
NIXL_HD constexpr PeerVersion unmasked(const PeerVersion& version, const PushHeader& slot0, const PushHeader& slot1) {
  PeerVersion now = version;
  NewestMessage newest;
  newest.count = newest_count(make_flag(slot0.incarnation, slot0.count), make_flag(slot1.incarnation, slot1.count),
                              now.incarnation);
  const PushHeader& last = flag_slot(newest.count) ? slot1 : slot0;
  newest.awaits = last.awaits;
  newest.stands = !(last.word & kHeaderWithdrawn);
  now.expected = expected_after(newest, now.sent);
  now.status = PeerStatus::kActive;
  return now;
}

// What becomes of a peer that gave nothing in operation `number`. `then`: its version in that operation; `latest`: its
// newest.
struct Failure {
  bool told = false;       // this rank masks it now, and says so
  bool withdrawn = false;  // what was sent to it in that operation is taken back: it must not take it for a later one's
  PeerVersion version;     // when told
  PushHeader header;       // when withdrawn, for the slot of its count
};
NIXL_HD constexpr Failure failed_in(std::uint64_t number, const PeerVersion& then, const PeerVersion& latest,
                                    std::uint32_t own_incarnation) {
  Failure failure;
  // Detached meanwhile: its memory may be gone. Attached anew: that is somebody else.
  if (latest.status == PeerStatus::kAbsent || latest.incarnation != then.incarnation || latest.control != then.control)
    return failure;
  failure.withdrawn = true;
  failure.header = {own_incarnation, sent_in(then, number), expected_in(then, number), kHeaderWithdrawn};
  if (latest.status != PeerStatus::kActive) return failure;  // the caller has masked it
  failure.told = true;
  failure.version = advanced(latest, number + 1);
  failure.version.status = PeerStatus::kMasked;
  return failure;
}

}  // namespace nixl::core::ep
