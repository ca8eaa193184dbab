#include "backends/samehost/offered_copy.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <string_view>

namespace nixl::core::samehost {
namespace {

constexpr std::uint64_t kLeastBytes = 8 << 20;       // in all: below, the target is not awake in time
constexpr std::uint64_t kLeastRowBytes = 256 << 10;  // shorter ones are read no quicker than written
constexpr Nanoseconds kStall = 2'000'000;            // a chunk takes 0.1 ms
constexpr Nanoseconds kAnswer = 500'000;             // the target's progress thread and its copy threads wake up
constexpr Nanoseconds kIdle = 20'000;
constexpr long kLookNs = 1'000'000, kShortNs = 200'000;

// Stretches that are long and contiguous on both sides; empty: there are others too.
std::vector<OfferedRow> long_rows(const Plan& plan) {
  std::vector<OfferedRow> rows;
  if (plan.op != Op::kWrite || plan.has_runs() || plan.total_bytes < kLeastBytes) return rows;
  std::uint32_t region = 0;
  for (std::size_t i = 0; i < plan.num_rows(); ++i) {
    const std::uint64_t source = plan.local_address[i], target = plan.remote_address[i], bytes = plan.length[i];
    if (bytes == 0) continue;
    if (!rows.empty()) {
      OfferedRow& last = rows.back();
      if (region == plan.remote_region[i] && last.source + last.bytes == source && last.target + last.bytes == target) {
        last.bytes += bytes;
        continue;
      }
      if (last.bytes < kLeastRowBytes || rows.size() == kMaxOfferedRows) return {};
    }
    region = plan.remote_region[i];
    const auto& far = static_cast<const FarRegion&>(*plan.remote_regions[region]);
    rows.push_back({source, target, bytes, far.slot(), far.generation()});
  }
  if (rows.back().bytes < kLeastRowBytes || plan.total_bytes / kOfferedChunkBytes + rows.size() > kMaxOfferedChunks)
    return {};
  return rows;
}

// The thread neither runs nor can go on by itself: by a signal or a debugger, never inside of a copy.
bool is_stopped(std::uint32_t process, std::uint32_t thread) noexcept {
  std::array<char, 64> path;
  std::array<char, 256> text;
  std::snprintf(path.data(), path.size(), "/proc/%u/task/%u/stat", process, thread);
  const Fd file(::open(path.data(), O_RDONLY | O_CLOEXEC));
  const ssize_t got = file ? ::read(file.get(), text.data(), text.size()) : 0;
  const std::string_view line(text.data(), static_cast<std::size_t>(std::max<ssize_t>(got, 0)));
  const std::size_t name_end = line.rfind(") ");
  return name_end != line.npos && (line[name_end + 2] == 'T' || line[name_end + 2] == 't');
}

}  // namespace

std::shared_ptr<OfferedCopy> OfferedCopy::make(const Plan& plan, std::shared_ptr<Mailbox> mailbox) {
  OfferedRows rows(long_rows(plan));
  if (rows.num_chunks() == 0) return nullptr;
  auto desk = static_cast<PeerConnection*>(plan.peer)->pull_desk();
  if (!desk) return nullptr;
  return std::make_shared<OfferedCopy>(plan, std::move(rows), std::move(desk), std::move(mailbox));
}

OfferedCopy::OfferedCopy(const Plan& plan, OfferedRows rows, std::shared_ptr<PullDesk> desk,
                         std::shared_ptr<Mailbox> mailbox)
    : TransferJob(rows.num_chunks(), plan, std::move(mailbox)), rows_(std::move(rows)), desk_(std::move(desk)) {}

void OfferedCopy::start() {
  const PullBoard& board = desk_->board;
  const std::uint64_t number = ++desk_->last_offer;
  for (std::uint32_t chunk = 0; chunk < rows_.num_chunks(); ++chunk)
    board->chunks[chunk].store(chunk_word(number, kFree), std::memory_order_relaxed);
  board->next.store(0, std::memory_order_relaxed);
  board->joined.store(0, std::memory_order_relaxed);
  board->offer.store(number, std::memory_order_seq_cst);
  {
    std::lock_guard lock(share_mutex_);
    moved_ = 0;
    ended_ = false;
    offer_.store(number, std::memory_order_seq_cst);
  }
  const Nanoseconds now = now_ns();
  offered_at_.store(now, std::memory_order_relaxed);
  seen_at_.store(now, std::memory_order_relaxed);
  Job::start();
  const Offer offer{mailbox_->address(), static_cast<std::uint32_t>(board.fd()), board->id, number, rows_.rows()};
  ending.peer().offer(offer.encode());
}

bool OfferedCopy::peer_joined() const noexcept {
  return desk_->board->joined.load(std::memory_order_acquire) == offer_.load();
}

bool OfferedCopy::peer_pulls() noexcept {
  const PullBoard& board = desk_->board;
  if (!peer_joined()) return false;
  // One that may use fewer cores than we is helped.
  if (board->threads.load(std::memory_order_relaxed) < CopyThreads::count()) return false;
  const std::uint32_t pulled = board->pulled.load(std::memory_order_acquire);
  if (pulled != seen_.load(std::memory_order_relaxed)) {
    seen_.store(pulled, std::memory_order_relaxed);
    seen_at_.store(now_ns(), std::memory_order_relaxed);
    return true;
  }
  return now_ns() - seen_at_.load(std::memory_order_relaxed) < kStall;
}

// Something was done towards the end of the submission by this thread.
bool OfferedCopy::step() {
  bool moved = false;
  if (failed() || !peer_pulls()) moved = push_one() || recover();
  end_if_moved();
  return moved;
}

// Leaves the core to the target's threads; they end it.
void OfferedCopy::rest(std::uint32_t seen, long at_most_ns) noexcept {
  const timespec limit{0, at_most_ns};
  ::syscall(SYS_futex, &desk_->board->pulled, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

bool OfferedCopy::run_one() {
  if (finished()) return false;
  const std::uint32_t before = desk_->board->pulled.load(std::memory_order_acquire);
  if (step() || finished()) return !finished();
  if (!peer_joined()) {
    ::sched_yield();
    return true;
  }
  // Short for a caller that has other things to do between two polls.
  const bool idle = now_ns() - rested_at_.load(std::memory_order_relaxed) < kIdle;
  rest(before, idle ? kLookNs : kShortNs);
  rested_at_.store(now_ns(), std::memory_order_relaxed);
  return !finished();
}

bool OfferedCopy::work() {
  if (finished()) return false;
  const std::uint32_t before = desk_->board->pulled.load(std::memory_order_acquire);
  // The target needs a core to wake up on: until it answers, whoever polls pushes alone.
  if (!failed() && !peer_joined() && now_ns() - offered_at_.load(std::memory_order_relaxed) < kAnswer) {
    rest(before, kShortNs);
    return !finished();
  }
  if (step()) return !finished();
  if (finished() || watched_.exchange(true)) return false;
  rest(before, kLookNs);
  watched_.store(false);
  return !finished();
}

bool OfferedCopy::push_one() {
  const std::uint32_t chunk = desk_->board.take(offer_.load(), rows_.num_chunks(), kPushed);
  if (chunk == rows_.num_chunks()) return false;
  push(chunk);
  return true;
}

void OfferedCopy::push(std::uint32_t chunk) {
  if (!failed())
    if (auto copied = copy_chunk(chunk); !copied) note(std::move(copied).error());
  desk_->board.change(offer_.load(), chunk, kPushed, kMoved);
}

Result<void> OfferedCopy::copy_chunk(std::uint32_t index) {
  PeerConnection& peer = ending.peer();
  if (peer.lost()) NIXL_TRY(peer.check_alive());
  NIXL_TRY(ending.check_all_registered());
  const OfferedRow piece = rows_.chunk(index);
  iovec local{reinterpret_cast<void*>(piece.source), piece.bytes};
  iovec remote{reinterpret_cast<void*>(piece.target), piece.bytes};
  auto copied = peer.process().copy(Op::kWrite, {&local, 1}, {&remote, 1});
  if (!copied && copied.error().code == Code::kPeerLost) NIXL_TRY(peer.check_alive(true));
  return copied;
}

// No chunk is left to take by the way: those that a puller gave back or was stopped in.
bool OfferedCopy::recover() {
  std::uint32_t chunk;
  {
    // While it is held the submission does not end, so the peer stays.
    const std::unique_lock lock(share_mutex_, std::try_to_lock);
    if (!lock || ended_) return false;
    bool changed = false;
    for (chunk = moved_; chunk < rows_.num_chunks() && !changed; ++chunk) changed = take_back(chunk);
    if (!changed) return false;
    --chunk;
  }
  if (desk_->board.state(chunk) == kPushed) push(chunk);
  return true;
}

bool OfferedCopy::take_back(std::uint32_t chunk) {
  const PullBoard& board = desk_->board;
  const std::uint64_t offer = offer_.load();
  const unsigned state = board.state(chunk);
  if (state == kFree) return board.change(offer, chunk, kFree, kPushed);
  if (state < kPulled) return false;
  PeerConnection& peer = ending.peer();
  if (auto alive = peer.check_alive(); !alive) {
    note(std::move(alive).error());
    return board.change(offer, chunk, state, kMoved);
  }
  const unsigned puller = state % kPulled;
  if (puller >= CopyThreads::kMost) return false;
  PullerSlot& slot = board->pullers[puller];
  const bool stopped = is_stopped(peer.process().pid(), slot.thread.load());
  if (state < kRevoked) {
    // It may have been stopped just before its call. Should it go on, the call finds nothing to copy; that it has not
    // gone on already is what the next look has to show.
    if (!stopped || !board.change(offer, chunk, state, kRevoked + puller)) return false;
    std::atomic_ref(slot.target.iov_len).store(0);
    std::atomic_ref(slot.source.iov_len).store(0);
    return true;
  }
  const bool left = slot.chunk.load() != (offer << 32 | (chunk + 1));
  return (stopped || left) && board.change(offer, chunk, state, kPushed);
}

void OfferedCopy::end_if_moved() {
  const PullBoard& board = desk_->board;
  {
    const std::unique_lock lock(share_mutex_, std::try_to_lock);
    if (!lock || ended_) return;
    const std::uint64_t moved = chunk_word(offer_.load(), kMoved);
    while (moved_ < rows_.num_chunks() && board->chunks[moved_].load(std::memory_order_acquire) == moved) ++moved_;
    if (moved_ < rows_.num_chunks()) return;
    ended_ = true;
  }
  board->offer.store(0, std::memory_order_seq_cst);
  desk_->taken.store(false, std::memory_order_release);
  end();
}

void OfferedCopy::abandon(Error why) noexcept {
  note(std::move(why));
  while (!finished() && push_one()) {
  }
  if (!finished()) step();
}

}  // namespace nixl::core::samehost
