// One exchange of messages between this rank and every unmasked peer: each stages data, announces it, and pulls what
// the others staged. A dispatch or combine is one exchange (a reduced combine without weights at dispatch is two).
//
// begin -> fill stage() -> publish        the send phase; never waits
// gather -> read sources() -> verify      the receive phase
//
// What was read counts only if verify() says so: a sender that has masked this rank goes on and overwrites its stage.
#pragma once
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "ep/cpu/memory.h"
#include "ep/cpu/peers.h"

namespace nixl::core::ep {

// Every place where the path waits for a peer. Each wait is limited by the timeout.
enum class WaitSite : int { kDispatch, kCombineWeights, kCombineRows, kBarrier };
const char* name(WaitSite site) noexcept;

struct Timing {
  Nanoseconds timeout_ns = 0;
  // A peer that was itself held up by another one gets this much longer than its own wait lasts.
  static constexpr Nanoseconds kGraceNs = 20'000'000;
};

// A rank whose message has arrived; this rank itself is one too.
struct Source {
  int rank = -1;
  Message message;
  Participant* participant = nullptr;  // null: this rank itself
};

class Exchange {
 public:
  // fault_words: int32 [kMaxRanks], set to nonzero for a peer that fails.
  Exchange(Channel channel, int rank, std::uint32_t incarnation, Timing timing, OwnMemory& own, PeerTable& peers,
           std::int32_t* fault_words);

  // Takes the unmasked peers below `num_ranks` and a slot to stage in. `operation` names faults.
  void begin(std::uint64_t operation, nixl::ep::Phase phase, int num_ranks);
  // Another exchange of the same operation, with whoever is left of the one before.
  void begin_again();
  // The slot that the next begin will use. Nobody reads it any more.
  int next_slot();
  // This rank itself and the participants.
  bool reaches(int rank) const { return rank == rank_ || reached_[static_cast<std::size_t>(rank)]; }

  // Memory to stage in, `at` bytes into the slot, after its readers have been warned that it changes.
  Result<std::byte*> stage(std::int64_t bytes, std::int64_t at = 0);
  // Announces the stage to all participants; the caller fills what describes it, the rest is set here.
  void publish(Message message);
  int slot() const { return slot_; }

  // Waits for every participant's message. Those that do not come are masked. `wait_cost` (or null) is indexed by rank
  // and gets the nanoseconds waited added.
  void gather(WaitSite site, std::int64_t* wait_cost);
  // By ascending rank, this rank included.
  std::span<Source> sources() { return sources_; }
  // The stage of a source; null when it lies outside its memory.
  const std::byte* stage_of(const Source& source, std::int64_t bytes) const;
  // Bytes [offset, offset + bytes) of a source's data memory; null likewise.
  const std::byte* memory_of(const Source& source, std::int64_t offset, std::int64_t bytes) const;
  // Masks a source whose message does not fit this rank's call; it is out of sources() afterwards.
  void reject(const Source& source);
  // Whether all that was read from sources() is what they announced; then the senders are told that it was taken. If
  // not, the peers in question are masked and out of sources(), and everything has to be read again.
  bool verify();

  // On the channel of barriers: returns when every unmasked peer has come here too, or was masked.
  void barrier(std::uint64_t operation);

 private:
  enum class Stand { kPending, kArrived, kOut };
  struct Waiting {
    Stand stand = Stand::kPending;
    Nanoseconds deadline = 0;
    Nanoseconds excuse = 0;  // what the deadline was last extended for
    FlagWord expected = 0;
    FlagWord seen = 0;
    Message message;
  };

  // Whoever was sent a slot's stage, and the count under which.
  struct Staging {
    Nanoseconds at = 0;
    struct Reader {
      std::shared_ptr<Peer> peer;
      FlagWord taken = 0;  // what it leaves in this rank's inbox when it has read it
    };
    std::vector<Reader> readers;
  };

  // Waits until every participant's message has arrived, or its deadline has passed and it is masked.
  void wait_all(WaitSite site, std::int64_t* wait_cost);
  bool look_at_pending(std::int64_t* wait_cost, Nanoseconds start);
  // Fails those whose time is up. Gives the first deadline of the others, 0 if any failed; publishes the last one.
  Nanoseconds next_deadline(std::int64_t* wait_cost, Nanoseconds start, Nanoseconds now);
  void look_for_message(std::size_t i);
  bool read_header(const Participant& participant, Waiting& waiting) const;
  bool still_holds(const Participant& participant, const Waiting& waiting) const;
  bool keeps_waiting(std::size_t i, Nanoseconds start, Nanoseconds now);
  void fail(std::size_t i, const char* why);
  void announce(const Message& message);
  void list_sources();
  void take_slot();
  bool still_read(int slot, Nanoseconds now) const;

  const Channel channel_;
  const int rank_;
  const std::uint32_t incarnation_;
  const Timing timing_;
  OwnMemory& own_;
  PeerTable& peers_;
  std::int32_t* const fault_words_;
  const int cores_;
  std::uint64_t operation_ = 0;
  nixl::ep::Phase phase_ = nixl::ep::Phase::kDispatch;
  WaitSite site_ = WaitSite::kDispatch;
  int slot_ = 0;
  int next_slot_ = -1;  // chosen already
  std::int64_t stage_at_ = 0;
  Message own_message_;
  std::vector<Participant> participants_;
  std::vector<Waiting> waiting_;
  std::vector<Source> sources_;
  std::vector<char> reached_;
  Staging stagings_[kSlots];
};

}  // namespace nixl::core::ep
