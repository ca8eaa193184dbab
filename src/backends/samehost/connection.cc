#include "backends/samehost/connection.h"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>

#include "backends/samehost/pull_board.h"
#include "backends/samehost/vram.h"
#include "base/log.h"

namespace nixl::core::samehost {
namespace {

constexpr long kBacklogRetryNs = 1'000'000;

bool left(PeerConnection& peer) {
  return peer.process().segment().header().closed.load(std::memory_order_acquire) != 0;
}

Error gone(PeerConnection& peer) {
  return {Code::kPeerLost, "agent '" + peer.id().name + "' (process " + std::to_string(peer.process().pid()) +
                               " of this host) " + (left(peer) ? "left" : "died")};
}

}  // namespace

PeerConnection::PeerConnection(PeerId id, PeerProcess process, LaneWriter writer, const Address& address,
                               std::shared_ptr<Mailbox> mailbox, std::shared_ptr<PeerTable> table)
    : id_(std::move(id)),
      process_(std::move(process)),
      doorbell_(Doorbell::named(address.doorbell)),
      mailbox_(std::move(mailbox)),
      table_(std::move(table)),
      writer_(std::move(writer)) {
  writer_.move_to(process_.segment());
}

PeerConnection::~PeerConnection() {
  table_->remove(*this);
  writer_.leave();
}

Result<void> PeerConnection::check_alive(bool now) {
  if (lost()) return fail(gone(*this));
  if (process_.alive(now)) return {};
  note_lost(gone(*this));
  return fail(gone(*this));
}

void PeerConnection::note_lost(const Error& why) {
  if (!lost_.exchange(true, std::memory_order_acq_rel)) table_->tell_lost(id_, why, left(*this));
}

void PeerConnection::send(std::string_view message) {
  bool left;
  {
    std::lock_guard lock(mutex_);
    writer_.send(message);
    wake_locked();
    left = !writer_.idle();
  }
  if (left) {
    backlog_.store(true, std::memory_order_release);
    table_->note_backlog();
  }
}

void PeerConnection::offer(std::string_view payload) noexcept {
  std::lock_guard lock(mutex_);
  if (writer_.try_send(payload, kOffer)) mailbox_->ring(process_.segment(), doorbell_);
}

std::shared_ptr<PullDesk> PeerConnection::pull_desk() {
  std::lock_guard lock(mutex_);
  // Within one process pushing and pulling take the same threads.
  if (desk_ || process_.pid() == static_cast<std::uint32_t>(::getpid())) return desk_;
  if (auto board = PullBoard::create())
    desk_ = std::make_shared<PullDesk>(std::move(*board));
  else
    NIXL_DEBUG("agent '%s' is not asked to pull: %s", id_.name.c_str(), board.error().reason.c_str());
  return desk_;
}

void PeerConnection::wake_locked() noexcept {
  if (!events_.signal(process_)) mailbox_->ring(process_.segment(), doorbell_);
}

bool PeerConnection::push() {
  if (!backlog_.load(std::memory_order_acquire)) return false;
  if (lost()) {
    backlog_.store(false, std::memory_order_release);
    return false;
  }
  bool left;
  {
    std::lock_guard lock(mutex_);
    if (writer_.push()) wake_locked();
    left = !writer_.idle();
    backlog_.store(left, std::memory_order_release);
  }
  return left;
}

Result<std::shared_ptr<PeerTable>> PeerTable::open(Events* events, int doorbell) {
  auto table = std::make_shared<PeerTable>();
  table->events_ = events;
  table->epoll_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  table->timer_ = Fd(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  if (!table->epoll_ || !table->timer_) return fail(errno_error("epoll and timer of the same-host backend", errno));
  for (const auto& [fd, key] : {std::pair{doorbell, kDoorbell}, std::pair{table->timer_.get(), kTimer}}) {
    epoll_event event{EPOLLIN, {.u64 = key}};
    if (::epoll_ctl(table->epoll_fd(), EPOLL_CTL_ADD, fd, &event) != 0)
      return fail(errno_error("epoll_ctl of the same-host backend", errno));
  }
  return table;
}

Result<void> PeerTable::add(PeerConnection& peer) {
  epoll_event event{EPOLLIN, {.u64 = reinterpret_cast<std::uint64_t>(&peer)}};
  std::lock_guard lock(mutex_);
  if (::epoll_ctl(epoll_fd(), EPOLL_CTL_ADD, peer.process().pid_fd(), &event) != 0)
    return fail(errno_error("epoll_ctl of a peer's process descriptor", errno));
  peers_.push_back(&peer);
  return {};
}

void PeerTable::remove(PeerConnection& peer) noexcept {
  std::lock_guard lock(mutex_);
  ::epoll_ctl(epoll_fd(), EPOLL_CTL_DEL, peer.process().pid_fd(), nullptr);
  std::erase(peers_, &peer);
}

void PeerTable::tell_lost(const PeerId& peer, const Error& why, bool left) noexcept {
  if (!events_) return;
  if (left)
    events_->peer_left(peer, why);
  else
    events_->peer_lost(peer, why);
}

void PeerTable::note_backlog() noexcept {
  backlog_.store(true, std::memory_order_release);
  const itimerspec soon{{0, kBacklogRetryNs}, {0, kBacklogRetryNs}};
  ::timerfd_settime(timer_.get(), 0, &soon, nullptr);
}

bool PeerTable::serve(bool& doorbell) {
  std::array<epoll_event, 16> events;
  const int count = ::epoll_wait(epoll_fd(), events.data(), static_cast<int>(events.size()), 0);
  bool any = false;
  for (int i = 0; i < count; ++i) {
    const std::uint64_t key = events[i].data.u64;
    if (key == kDoorbell) {
      doorbell = any = true;
    } else if (key == kTimer) {
      std::uint64_t ticks;
      (void)!::read(timer_.get(), &ticks, sizeof ticks);
    } else {
      std::lock_guard lock(mutex_);
      const auto peer = std::find(peers_.begin(), peers_.end(), reinterpret_cast<PeerConnection*>(key));
      if (peer == peers_.end()) continue;  // dropped since
      // A dead process stays readable: it must not wake us again.
      ::epoll_ctl(epoll_fd(), EPOLL_CTL_DEL, (*peer)->process().pid_fd(), nullptr);
      (void)(*peer)->check_alive(true);
      any = true;
    }
  }
  return any;
}

bool PeerTable::push_backlogs() {
  std::lock_guard lock(mutex_);
  bool left = false;
  // Cleared first: a message queued meanwhile sets it again.
  backlog_.store(false, std::memory_order_release);
  for (PeerConnection* peer : peers_) left |= peer->push();
  if (left) {
    backlog_.store(true, std::memory_order_release);
  } else if (!has_backlog()) {
    const itimerspec never{};
    ::timerfd_settime(timer_.get(), 0, &never, nullptr);
  }
  return true;
}

Result<std::pair<std::uint32_t, std::uint64_t>> SlotTable::take(std::uint64_t address, std::uint64_t length) {
  std::lock_guard lock(mutex_);
  std::uint32_t slot;
  if (!free_.empty()) {
    slot = free_.back();
    free_.pop_back();
  } else if (used_ < kNumSlots) {
    slot = used_++;
    ranges_.emplace_back();
  } else {
    return fail(Code::kUnsupported, "all %u regions of the same-host segment are in use", kNumSlots);
  }
  ranges_[slot] = {address, length};
  const std::uint64_t generation = next_generation_++;
  mailbox_->segment().slot(slot).store(generation, std::memory_order_release);
  return std::pair{slot, generation};
}

void SlotTable::give_back(std::uint32_t slot) noexcept {
  // A forked child drops copies of what its parent goes on using.
  if (mailbox_->segment().header().pid != static_cast<std::uint32_t>(::getpid())) return;
  std::lock_guard lock(mutex_);
  mailbox_->segment().slot(slot).store(0, std::memory_order_release);
  free_.push_back(slot);
}

bool SlotTable::holds(std::uint32_t slot, std::uint64_t generation, std::uint64_t address, std::uint64_t bytes) {
  std::lock_guard lock(mutex_);
  if (slot >= used_ || mailbox_->segment().slot(slot).load(std::memory_order_acquire) != generation) return false;
  const auto [start, length] = ranges_[slot];
  return address >= start && address - start <= length && bytes <= length - (address - start);
}

OwnRegion::OwnRegion(std::shared_ptr<SlotTable> slots, std::uint32_t slot, std::uint64_t generation,
                     std::unique_ptr<VramExport> vram, HugeRange pages)
    : slots_(std::move(slots)),
      slot_(slot),
      generation_(generation),
      vram_(std::move(vram)),
      pages_(std::move(pages)) {}

OwnRegion::~OwnRegion() {
  slots_->give_back(slot_);
}

FarRegion::FarRegion(PeerConnection& peer, std::uint32_t slot, std::uint64_t generation,
                     std::unique_ptr<VramMapping> vram, std::unique_ptr<SharedMapping> shared)
    : index_(slot),
      slot_(&peer.process().segment().slot(slot)),
      generation_(generation),
      vram_(std::move(vram)),
      shared_(std::move(shared)) {}

FarRegion::~FarRegion() = default;

}  // namespace nixl::core::samehost
