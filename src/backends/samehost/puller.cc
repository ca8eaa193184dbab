#include "backends/samehost/puller.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdio>

#include "base/log.h"

namespace nixl::core::samehost {

// An initiator and its board.
struct PullSource {
  PullSource(PeerProcess opened, PullBoard mapped) : process(std::move(opened)), board(std::move(mapped)) {}
  PeerProcess process;
  const PullBoard board;
};

namespace {

constexpr std::size_t kMaxSources = 16, kMaxRefused = 16;

// One offer being worked off, by up to all copy threads.
class Pull final : public Work {
 public:
  Pull(std::shared_ptr<PullSource> source, Offer offer, std::shared_ptr<Mailbox> mailbox)
      : source_(std::move(source)), number_(offer.number), rows_(std::move(offer.rows)), mailbox_(std::move(mailbox)) {}
  bool work() override;

 private:
  bool pull(std::uint32_t chunk, unsigned puller);
  void tell(bool wake) noexcept;

  const std::shared_ptr<PullSource> source_;
  const std::uint64_t number_;
  const OfferedRows rows_;
  const std::shared_ptr<Mailbox> mailbox_;  // keeps the slots of the regions mapped
  std::atomic<bool> given_up_{false};
};

bool Pull::work() {
  const PullBoard& board = source_->board;
  const unsigned puller = CopyThreads::index();
  std::uint32_t chunk = rows_.num_chunks();
  if (!given_up_.load(std::memory_order_relaxed)) {
    board->pullers[puller].thread.store(static_cast<std::uint32_t>(::gettid()), std::memory_order_relaxed);
    chunk = board.take(number_, rows_.num_chunks(), kFree);  // not ours before pull() has changed it
  }
  if (chunk < rows_.num_chunks() && pull(chunk, puller)) {
    tell(false);
    return true;
  }
  if (chunk < rows_.num_chunks()) {
    given_up_.store(true, std::memory_order_relaxed);
    std::uint64_t joined = number_;
    board->joined.compare_exchange_strong(joined, 0, std::memory_order_acq_rel);
  }
  tell(true);
  return false;
}

// false: this chunk is the initiator's, and the rest too.
bool Pull::pull(std::uint32_t chunk, unsigned puller) {
  const PullBoard& board = source_->board;
  const OfferedRow piece = rows_.chunk(chunk);
  if (mailbox_->segment().slot(piece.slot).load(std::memory_order_acquire) != piece.generation ||
      !source_->process.alive())
    return false;
  PullerSlot& slot = board->pullers[puller];
  slot.target.iov_base = reinterpret_cast<void*>(piece.target);
  slot.source.iov_base = reinterpret_cast<void*>(piece.source);
  std::atomic_ref(slot.target.iov_len).store(piece.bytes);
  std::atomic_ref(slot.source.iov_len).store(piece.bytes);
  slot.chunk.store(number_ << 32 | (chunk + 1), std::memory_order_seq_cst);
  bool whole = true;
  // All is told before this: the initiator may revoke the chunk from here on.
  if (board.change(number_, chunk, kFree, kPulled + puller)) {
    const auto pid = static_cast<pid_t>(source_->process.pid());
    whole = ::process_vm_readv(pid, &slot.target, 1, &slot.source, 1, 0) == static_cast<ssize_t>(piece.bytes);
    // Revoked meanwhile: the initiator copies it once more.
    if (!board.change(number_, chunk, kPulled + puller, whole ? kMoved : kFree)) whole = true;
  }
  slot.chunk.store(0, std::memory_order_seq_cst);
  return whole;
}

void Pull::tell(bool wake) noexcept {
  auto& pulled = source_->board->pulled;
  pulled.fetch_add(1, std::memory_order_release);
  if (wake) ::syscall(SYS_futex, &pulled, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

void Puller::accept(std::string_view offer) {
  if (auto started = start(offer); !started) NIXL_DEBUG("a write is not pulled: %s", started.error().reason.c_str());
}

Result<void> Puller::start(std::string_view bytes) {
  NIXL_ASSIGN(Offer offer, Offer::decode(bytes));
  for (const OfferedRow& row : offer.rows)
    if (!slots_->holds(row.slot, row.generation, row.target, row.bytes))
      return fail(Code::kNotFound, "%llu bytes at %#llx lie in no region registered here",
                  static_cast<unsigned long long>(row.bytes), static_cast<unsigned long long>(row.target));
  std::lock_guard lock(mutex_);
  NIXL_ASSIGN(auto from, source(offer));
  // Behind already: the initiator has pushed it all.
  if (from->board->offer.load(std::memory_order_seq_cst) != offer.number) return {};
  from->board->threads.store(CopyThreads::count(), std::memory_order_relaxed);
  from->board->joined.store(offer.number, std::memory_order_release);
  if (!threads_) threads_ = CopyThreads::shared();
  threads_->add(std::make_shared<Pull>(std::move(from), std::move(offer), mailbox_), false);
  return {};
}

Result<std::shared_ptr<PullSource>> Puller::source(const Offer& offer) {
  std::erase_if(sources_, [](const auto& known) { return !known->process.alive(); });
  const auto found = std::find_if(sources_.begin(), sources_.end(),
                                  [&](const auto& known) { return known->board->id == offer.board_id; });
  if (found != sources_.end()) {
    std::rotate(found, found + 1, sources_.end());
    return sources_.back();
  }
  auto opened = std::find(refused_.begin(), refused_.end(), offer.board_id) == refused_.end()
                    ? open(offer)
                    : fail(Code::kUnsupported, "its initiator could not be read before");
  if (!opened) {
    if (refused_.size() == kMaxRefused) refused_.erase(refused_.begin());
    refused_.push_back(offer.board_id);
    return opened;
  }
  if (sources_.size() == kMaxSources) sources_.erase(sources_.begin());
  sources_.push_back(*opened);
  return opened;
}

Result<std::shared_ptr<PullSource>> Puller::open(const Offer& offer) {
  NIXL_ASSIGN(const Address address, Address::decode(offer.address));
  NIXL_ASSIGN(PeerProcess process, PeerProcess::open(address));
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%u/fd/%u", address.pid, offer.board_fd);
  Fd file(::open(path, O_RDWR | O_CLOEXEC));
  if (!file) return fail(errno_error(path, errno));
  NIXL_ASSIGN(PullBoard board, PullBoard::map(std::move(file), offer.board_id));
  return std::make_shared<PullSource>(std::move(process), std::move(board));
}

}  // namespace nixl::core::samehost
