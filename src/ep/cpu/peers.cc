#include "ep/cpu/peers.h"

#include <algorithm>

namespace nixl::core::ep {

Result<void> PeerTable::attach(const PeerIdentity& peer, Export memory) {
  if (peer.rank < 0 || peer.rank >= kMaxRanks || peer.rank == rank_)
    return fail(Code::kInvalidArgument, "rank %d cannot be attached to rank %d: allowed are 0 to %d, without itself",
                peer.rank, rank_, kMaxRanks - 1);
  NIXL_ASSIGN(ImportedMemory imported, ImportedMemory::open(peer, std::move(memory)));
  auto added = std::make_shared<Peer>();
  added->rank = peer.rank;
  added->memory = std::move(imported);
  for (PairState& pair : added->pairs) pair.connect(peer.incarnation);
  std::lock_guard lock(mutex_);
  if (peers_[peer.rank]) return fail(Code::kNotAllowed, "rank %d is attached already: detach it first", peer.rank);
  // Words of an earlier connection; the peer writes none before both sides have attached.
  Inbox& inbox = own_.control().inbox(peer.rank);
  for (auto& slots : inbox.flags)
    for (auto& flag : slots) flag.store(0, std::memory_order_relaxed);
  inbox.taken.store(0, std::memory_order_relaxed);
  peers_[peer.rank] = std::move(added);
  attached_.insert(std::lower_bound(attached_.begin(), attached_.end(), peer.rank), peer.rank);
  return {};
}

Result<void> PeerTable::detach(int rank) {
  std::unique_lock lock(mutex_);
  std::shared_ptr<Peer> peer = find(rank);
  if (!peer) return fail(Code::kNotFound, "rank %d is not attached", rank);
  mask_locked(*peer);
  peer->gone.store(true, std::memory_order_release);
  peers_[rank] = nullptr;
  std::erase(attached_, rank);
  own_.control().hello().doorbell.ring();
  const std::uint64_t running = phases_;
  phase_ended_.wait(lock, [&] { return !phase_runs_ || phases_ != running; });
  // Later phases see that it is gone and do not look at its memory.
  peer->memory = ImportedMemory();
  return {};
}

void PeerTable::detach_all() {
  std::vector<int> ranks;
  {
    std::lock_guard lock(mutex_);
    ranks = attached_;
    if (ranks.empty()) return;
    for (int rank : ranks) mask_locked(*peers_[rank]);
    own_.control().hello().doorbell.ring();
  }
  for (int rank : ranks) (void)detach(rank);
}

void PeerTable::mask_locked(Peer& peer) {
  if (peer.masked.load(std::memory_order_relaxed)) return;
  peer.masked.store(true, std::memory_order_release);
  peer.masks.fetch_add(1, std::memory_order_release);
  // The message of an operation in which it was not heard is taken back, so that it learns of the mask and cannot pair
  // the message with a later operation. Any other stays: the peer has begun that operation too, and may still be
  // reading.
  for (Channel channel : {Channel::kOperations, Channel::kBarriers}) {
    const int c = static_cast<int>(channel);
    if (peer.heard[c] != peer.pairs[c].sent)
      own_.control().header(peer.rank, channel, peer.pairs[c].sent).revoked.store(1, std::memory_order_release);
  }
}

void PeerTable::catch_up(Peer& peer, Channel channel) {
  PairState& pair = peer.pairs[static_cast<int>(channel)];
  const bool under_way = peer.heard[static_cast<int>(channel)] != pair.sent;
  if (under_way && !peer.masked.load(std::memory_order_relaxed)) return;  // it counts by itself
  Inbox& inbox = own_.control().inbox(peer.rank);
  const std::uint32_t newest = newest_count(inbox.flag(channel, 0).load(std::memory_order_acquire),
                                            inbox.flag(channel, 1).load(std::memory_order_acquire), pair.incarnation);
  const Header& header = peer.memory.control().header(rank_, channel, newest);
  NewestMessage message;
  message.count = newest;
  const bool whole = header.count.load(std::memory_order_acquire) == newest;
  message.awaits = header.awaits.load(std::memory_order_acquire);
  message.stands = whole && header.revoked.load(std::memory_order_acquire) == 0;
  pair.unmask(message);
}

Result<void> PeerTable::set_mask(std::span<const int> ranks, bool masked) {
  std::lock_guard lock(mutex_);
  for (int rank : ranks) {
    if (rank < 0 || rank >= kMaxRanks || (masked && rank == rank_))
      return fail(Code::kInvalidArgument, "rank %d cannot be %s here: rank %d is this rank, allowed are 0 to %d", rank,
                  masked ? "masked" : "unmasked", rank_, kMaxRanks - 1);
    if (!masked && rank != rank_ && !peers_[rank])
      return fail(Code::kNotAllowed, "rank %d cannot be unmasked: it is not connected; connect it first", rank);
  }
  for (int rank : ranks) {
    if (rank == rank_ || !peers_[rank]) continue;
    Peer& peer = *peers_[rank];
    if (masked) {
      mask_locked(peer);
      continue;
    }
    catch_up(peer, Channel::kOperations);
    catch_up(peer, Channel::kBarriers);
    peer.failed.store(false, std::memory_order_release);
    peer.masked.store(false, std::memory_order_release);
  }
  own_.control().hello().doorbell.ring();
  return {};
}

void PeerTable::query_masks(std::int32_t* out, int num_ranks) const {
  std::fill(out, out + num_ranks, -1);
  if (rank_ < num_ranks) out[rank_] = 0;
  std::lock_guard lock(mutex_);
  for (int rank : attached_)
    if (rank < num_ranks) out[rank] = peers_[rank]->masked.load(std::memory_order_relaxed) ? 1 : 0;
}

void PeerTable::begin_phase() {
  std::lock_guard lock(mutex_);
  phase_runs_ = true;
}

void PeerTable::end_phase() {
  {
    std::lock_guard lock(mutex_);
    phase_runs_ = false;
    ++phases_;
  }
  phase_ended_.notify_all();
}

void PeerTable::begin_operation(Channel channel, int num_ranks, std::vector<Participant>& out) {
  out.clear();
  std::lock_guard lock(mutex_);
  for (int rank : attached_) {
    Peer& peer = *peers_[rank];
    if (rank >= num_ranks || peer.masked.load(std::memory_order_relaxed)) continue;
    PairState& pair = peer.pairs[static_cast<int>(channel)];
    ++pair.sent;
    out.push_back({peers_[rank], pair, peer.masks.load(std::memory_order_relaxed)});
  }
}

void PeerTable::continue_operation(Channel channel, std::vector<Participant>& participants) {
  std::lock_guard lock(mutex_);
  std::erase_if(participants, [](const Participant& participant) { return participant.dropped(); });
  for (Participant& participant : participants) {
    PairState& pair = participant.peer->pairs[static_cast<int>(channel)];
    ++pair.sent;
    participant.pair = pair;
  }
}

void PeerTable::announce(Channel channel, std::span<const Participant> participants, const Message& message) {
  std::lock_guard lock(mutex_);  // against a mask that would take back what is not written yet
  for (const Participant& participant : participants) {
    if (participant.dropped()) continue;
    const std::uint32_t count = participant.pair.sent;
    Header& header = own_.control().header(participant.peer->rank, channel, count);
    header.count.exchange(0, std::memory_order_seq_cst);
    header.message = message;
    header.awaits.store(participant.pair.expected, std::memory_order_relaxed);
    header.revoked.store(0, std::memory_order_relaxed);
    header.count.store(count, std::memory_order_release);
  }
}

void PeerTable::accept(Channel channel, const Participant& participant) {
  std::lock_guard lock(mutex_);
  if (participant.dropped()) return;
  participant.peer->pairs[static_cast<int>(channel)].pass();
  participant.peer->heard[static_cast<int>(channel)] = participant.pair.sent;
}

bool PeerTable::fail_peer(const Participant& participant, const Fault& fault) {
  std::lock_guard lock(mutex_);
  if (participant.dropped()) return false;
  mask_locked(*participant.peer);
  participant.peer->failed.store(true, std::memory_order_release);
  faults_.push_back(fault);
  return true;
}

std::vector<Fault> PeerTable::take_faults() {
  std::lock_guard lock(mutex_);
  return std::exchange(faults_, {});
}

}  // namespace nixl::core::ep
