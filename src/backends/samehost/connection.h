// What this backend holds for one peer, and the regions of both sides.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string_view>
#include <vector>

#include "backends/samehost/callers_events.h"
#include "backends/samehost/huge_pages.h"
#include "backends/samehost/mailbox.h"
#include "backends/samehost/peer.h"
#include "backends/samehost/shared_memory.h"
#include "contract/backend.h"

namespace nixl::core::samehost {

class PeerTable;
struct PullDesk;
class VramExport;
class VramMapping;

class PeerConnection final : public Connection {
 public:
  PeerConnection(PeerId id, PeerProcess process, LaneWriter writer, const Address& address,
                 std::shared_ptr<Mailbox> mailbox, std::shared_ptr<PeerTable> table);
  ~PeerConnection() override;

  const PeerId& id() const noexcept { return id_; }
  PeerProcess& process() noexcept { return process_; }
  bool lost() const noexcept { return lost_.load(std::memory_order_acquire); }

  // kPeerLost when the process is gone (and tells the agent so, once).
  Result<void> check_alive(bool now = false);
  void note_lost(const Error& why);

  // Wakes the peer, if it sleeps, to see that we have connected.
  void announce() noexcept { mailbox_->ring(process_.segment(), doorbell_); }
  void send(std::string_view message);
  // Tells the peer, now or never, what it may pull.
  void offer(std::string_view payload) noexcept;
  // The board of writes that this peer may pull; null when there can be none. Set-up calls only.
  std::shared_ptr<PullDesk> pull_desk();
  // Moves queued message parts into the peer's lane; true while some are left.
  bool push();

 private:
  void wake_locked() noexcept;  // after something was put into the lane

  PeerId id_;
  PeerProcess process_;
  Doorbell doorbell_;
  std::shared_ptr<Mailbox> mailbox_;
  std::shared_ptr<PeerTable> table_;
  std::mutex mutex_;  // of writer_, events_ and desk_
  std::shared_ptr<PullDesk> desk_;
  LaneWriter writer_;
  CallersEvents events_;
  std::atomic<bool> backlog_{false};
  std::atomic<bool> lost_{false};
};

// The connections of one backend: what progress() looks after.
class PeerTable {
 public:
  static Result<std::shared_ptr<PeerTable>> open(Events* events, int doorbell);

  int epoll_fd() const noexcept { return epoll_.get(); }
  Result<void> add(PeerConnection& peer);
  void remove(PeerConnection& peer) noexcept;
  void tell_lost(const PeerId& peer, const Error& why, bool left) noexcept;
  // A connection has message parts that did not fit: push them soon.
  void note_backlog() noexcept;
  bool has_backlog() const noexcept { return backlog_.load(std::memory_order_acquire); }
  // Notices dead peers and pushes backlogs; `doorbell`: the mailbox was rung. true when something happened.
  bool serve(bool& doorbell);
  bool push_backlogs();

 private:
  static constexpr std::uint64_t kDoorbell = 0, kTimer = 1;
  Events* events_ = nullptr;
  Fd epoll_, timer_;
  std::mutex mutex_;  // of peers_: a connection in it stays alive while the lock is held
  std::vector<PeerConnection*> peers_;
  std::atomic<bool> backlog_{false};
};

// Ours: holds a slot of the segment; giving it back revokes the region at every peer.
class OwnRegion final : public LocalRegion {
 public:
  OwnRegion(std::shared_ptr<class SlotTable> slots, std::uint32_t slot, std::uint64_t generation,
            std::unique_ptr<VramExport> vram, HugeRange pages);
  ~OwnRegion() override;
  const VramExport* vram() const noexcept { return vram_.get(); }  // null: DRAM
  std::uint32_t slot() const noexcept { return slot_; }
  std::uint64_t generation() const noexcept { return generation_; }
  std::uint64_t address = 0, bytes = 0;
  std::optional<SharedExport> shared;  // DRAM that peers can map

 private:
  std::shared_ptr<SlotTable> slots_;
  std::uint32_t slot_;
  std::uint64_t generation_;
  std::unique_ptr<VramExport> vram_;
  HugeRange pages_;
};

class SlotTable {
 public:
  explicit SlotTable(std::shared_ptr<Mailbox> mailbox) : mailbox_(std::move(mailbox)) {}
  // For the region of `length` bytes at `address`, 0 if nothing may be pulled into it.
  Result<std::pair<std::uint32_t, std::uint64_t>> take(std::uint64_t address, std::uint64_t length);
  void give_back(std::uint32_t slot) noexcept;
  // `slot` is of this generation and its region holds all of these bytes.
  bool holds(std::uint32_t slot, std::uint64_t generation, std::uint64_t address, std::uint64_t bytes);

 private:
  std::shared_ptr<Mailbox> mailbox_;
  std::mutex mutex_;
  std::vector<std::uint32_t> free_;
  std::vector<std::pair<std::uint64_t, std::uint64_t>> ranges_;  // address and length, by slot
  std::uint32_t used_ = 0;
  std::uint64_t next_generation_ = 1;
};

class FarRegion final : public RemoteRegion {
 public:
  FarRegion(PeerConnection& peer, std::uint32_t slot, std::uint64_t generation, std::unique_ptr<VramMapping> vram,
            std::unique_ptr<SharedMapping> shared);
  ~FarRegion() override;
  const VramMapping* vram() const noexcept { return vram_.get(); }  // null: DRAM
  SharedMapping* shared() const noexcept { return shared_.get(); }  // null: not mapped here
  // false once the owner has deregistered it.
  bool registered() const noexcept { return slot_->load(std::memory_order_acquire) == generation_; }
  std::uint32_t slot() const noexcept { return index_; }
  std::uint64_t generation() const noexcept { return generation_; }
  std::uint64_t address = 0, bytes = 0;  // in the owner's process

 private:
  std::uint32_t index_;
  std::atomic<std::uint64_t>* slot_;
  std::uint64_t generation_;
  std::unique_ptr<VramMapping> vram_;
  std::unique_ptr<SharedMapping> shared_;
};

}  // namespace nixl::core::samehost
