// Where an initiator and the target of a large WRITE share out its chunks: a sealed memory file of the initiator's for
// each connection, mapped by the target as well. Format and rules: docs/samehost.md, "Pulled writes".
#pragma once
#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "backends/samehost/job.h"
#include "backends/samehost/peer.h"
#include "base/fd.h"
#include "base/result.h"

namespace nixl::core::samehost {

inline constexpr std::uint64_t kBoardMagic = 0x31445242'4c58494eull;  // "NIXLBRD1"
inline constexpr std::uint32_t kMaxOfferedChunks = 1 << 16;
inline constexpr std::size_t kMaxOfferedRows = 512;
inline constexpr std::uint64_t kOfferedChunkBytes = 1 << 20;

// A chunk's word: number of the offer << 8 | state. A thread that comes late, from an offer before, finds another
// number and changes nothing.
enum ChunkState : std::uint8_t {
  kFree = 0,      // whoever turns it into something else has it
  kPushed = 1,    // the initiator copies it
  kMoved = 2,     // done
  kPulled = 8,    // + number of the puller, which copies it
  kRevoked = 16,  // + number of the puller it was taken from, which may still be in it
};
constexpr std::uint64_t chunk_word(std::uint64_t offer, unsigned state) noexcept {
  return offer << 8 | state;
}

// Of one copy thread of the target. Only that thread writes, but for the lengths: the initiator zeroes them to revoke a
// chunk. They are the very arrays that the thread hands to the kernel, so that a call not yet begun moves nothing.
struct alignas(64) PullerSlot {
  std::atomic<std::uint64_t> chunk;  // what it has pulled last or is pulling: offer << 32 | index + 1; 0: out of it
  std::atomic<std::uint32_t> thread;
  iovec target, source;
};

struct BoardHeader {
  std::uint64_t magic, id;  // id: random, so that a board is never taken for one whose descriptor had the same number
  alignas(64) std::atomic<std::uint64_t> offer;   // being worked off; 0: none
  std::atomic<std::uint64_t> joined;              // the offer that the target works on, with
  std::atomic<std::uint32_t> threads;             // so many threads
  alignas(64) std::atomic<std::uint32_t> next;    // a hint where a free chunk is; every chunk's word decides
  alignas(64) std::atomic<std::uint32_t> pulled;  // rises with whatever the target does; a futex
  PullerSlot pullers[CopyThreads::kMost];
  alignas(64) std::atomic<std::uint64_t> chunks[kMaxOfferedChunks];
};
static_assert(sizeof(PullerSlot) == 64 && sizeof(iovec) == 16);
static_assert(offsetof(BoardHeader, offer) == 64 && offsetof(BoardHeader, next) == 128);
static_assert(offsetof(BoardHeader, pulled) == 192 && offsetof(BoardHeader, pullers) == 256 &&
              offsetof(BoardHeader, chunks) == 512);

// A mapping of a board. Move-only; unmaps on destruction.
class PullBoard {
 public:
  static Result<PullBoard> create();
  // Checks size, seals, magic and id; kMismatch says what was seen.
  static Result<PullBoard> map(Fd file, std::uint64_t id);

  PullBoard() = default;
  PullBoard(PullBoard&& other) noexcept;
  PullBoard& operator=(PullBoard&& other) noexcept;
  ~PullBoard();
  BoardHeader* operator->() const noexcept { return header_; }
  int fd() const noexcept { return file_.get(); }

  // Takes a free chunk out of `count` by turning it into `state`; `count`: none was found or the offer is over.
  std::uint32_t take(std::uint64_t offer, std::uint32_t count, unsigned state) const noexcept;
  bool change(std::uint64_t offer, std::uint32_t chunk, unsigned from, unsigned to) const noexcept;
  unsigned state(std::uint32_t chunk) const noexcept {
    return static_cast<std::uint8_t>(header_->chunks[chunk].load(std::memory_order_seq_cst));
  }

 private:
  Fd file_;
  BoardHeader* header_ = nullptr;
};

// Long stretches, each contiguous on both sides.
struct OfferedRow {
  std::uint64_t source, target, bytes;  // addresses in the initiator and in the target
  std::uint32_t slot;                   // of the target's region
  std::uint64_t generation;
};

// Rows cut into chunks in order: no chunk reaches over the end of a row.
class OfferedRows {
 public:
  OfferedRows() = default;
  explicit OfferedRows(std::vector<OfferedRow> rows);
  std::uint32_t num_chunks() const noexcept { return ends_.empty() ? 0 : ends_.back(); }
  const std::vector<OfferedRow>& rows() const noexcept { return rows_; }
  // The piece that a chunk is.
  OfferedRow chunk(std::uint32_t index) const noexcept;

 private:
  std::vector<OfferedRow> rows_;
  std::vector<std::uint32_t> ends_;  // of each row: the number of chunks up to its end
};

// The initiator's end of one connection's board.
struct PullDesk {
  explicit PullDesk(PullBoard created) : board(std::move(created)) {}
  const PullBoard board;
  std::atomic<bool> taken{false};  // by one transfer at a time, which alone touches the next line
  std::uint64_t last_offer = 0;
};

// What travels in a lane: where the initiator and its board are, and what is to be pulled.
struct Offer {
  std::string address;         // of the initiator: Address::encode
  std::uint32_t board_fd = 0;  // in the initiator
  std::uint64_t board_id = 0;
  std::uint64_t number = 0;
  std::vector<OfferedRow> rows;

  std::string encode() const;
  static Result<Offer> decode(std::string_view bytes);
};

}  // namespace nixl::core::samehost
