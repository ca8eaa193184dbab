// Who is attached, who is masked, and how far each pair has counted.
//
// Thread-safe. An operation takes what it needs of a peer when it begins (Participant) and reports back; between the
// two other threads may attach, detach and mask. A mask or detach that comes while an operation runs drops the peer
// from it.
#pragma once
#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "ep/cpu/memory.h"

namespace nixl::core::ep {

struct Peer {
  int rank = -1;
  ImportedMemory memory;
  // Guarded by the table's mutex.
  PairState pairs[kChannels];
  std::uint32_t heard[kChannels] = {};  // `sent` of the newest operation in which it was heard
  // Changed under the mutex, read by operations without it.
  std::atomic<bool> masked{true};
  std::atomic<bool> failed{false};  // masked because it failed an operation
  std::atomic<bool> gone{false};
  std::atomic<std::uint32_t> masks{0};  // times it was masked: an operation notices one that came and went
};

// A peer as one operation sees it.
struct Participant {
  std::shared_ptr<Peer> peer;
  PairState pair;  // as of the operation's begin, `sent` already counted
  std::uint32_t masks = 0;

  bool dropped() const {
    return peer->gone.load(std::memory_order_acquire) || peer->masks.load(std::memory_order_acquire) != masks;
  }
};

class PeerTable {
 public:
  PeerTable(int rank, const OwnMemory& own) : rank_(rank), own_(own) {}

  Result<void> attach(const PeerIdentity& peer, Export memory);
  // Returns when no phase that may touch the peer runs any more and its memory is unmapped.
  Result<void> detach(int rank);
  // Ends a running phase early, as every wait in it loses its peer.
  void detach_all();
  // All or nothing: an unknown rank to unmask changes nothing. Unmasking a peer that is not masked matters too: this
  // rank may have sat out an operation that the peer began.
  Result<void> set_mask(std::span<const int> ranks, bool masked);
  void query_masks(std::int32_t* out, int num_ranks) const;

  // A phase of an operation runs between these; detach waits for it.
  void begin_phase();
  void end_phase();

  // The unmasked peers below num_ranks by ascending rank, for an exchange that sends to each of them. Counts it as
  // sent.
  void begin_operation(Channel channel, int num_ranks, std::vector<Participant>& out);
  // The same for a further exchange with those of `participants` that are still in.
  void continue_operation(Channel channel, std::vector<Participant>& participants);
  // Writes the headers of `message` for those participants that are still in.
  void announce(Channel channel, std::span<const Participant> participants, const Message& message);
  void accept(Channel channel, const Participant& participant);
  // Masks a peer that failed an operation, unless it was masked or detached meanwhile; false then.
  bool fail_peer(const Participant& participant, const Fault& fault);

  std::vector<Fault> take_faults();

 private:
  std::shared_ptr<Peer> find(int rank) const { return rank >= 0 && rank < kMaxRanks ? peers_[rank] : nullptr; }
  void mask_locked(Peer& peer);
  void catch_up(Peer& peer, Channel channel);

  const int rank_;
  const OwnMemory& own_;
  mutable std::mutex mutex_;
  std::condition_variable phase_ended_;
  std::array<std::shared_ptr<Peer>, kMaxRanks> peers_;
  std::vector<int> attached_;  // ascending
  std::vector<Fault> faults_;
  bool phase_runs_ = false;
  std::uint64_t phases_ = 0;
};

}  // namespace nixl::core::ep
