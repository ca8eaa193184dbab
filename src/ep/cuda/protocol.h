// What host and kernels of the CUDA path share: the state in device memory and the arguments of a launch.
#pragma once
#include <cstdint>

#include "ep/layout/peer_version.h"
#include "ep/layout/push.h"
#include "ep/layout/route.h"
#include "ep/layout/wire.h"

namespace nixl::core::ep::gpu {

inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kDispatchPiece = 8;  // most chunks of a piece, which a warp holds in registers
// Of a combine with sums on the way: most chunks of a piece, and of how many rows a warp holds a piece at once, beside the sum.
inline constexpr int kSumsThreads = 384;
constexpr int sums_piece(bool few) {
  return few ? 2 : 4;
}
constexpr int sums_ahead(bool few) {
  return few ? 4 : 2;
}
// Chunks of a token that a warp adds up at once.
constexpr int unit_chunks(int lanes, bool few) {
  return few || lanes == 1 ? 1 : 2;
}
// Of a combine of rows as they are: for few tokens, for few rows a token, and for what needs exact sums. Fewer threads, more registers
// each, most of all for few tokens.
enum class RowsKind { kFewTokens, kFewRows, kMany };
inline constexpr int kFewRows = 2;  // most rows of a token there
constexpr int rows_threads(RowsKind kind) {
  return kind == RowsKind::kFewTokens ? 256 : 384;
}
// Pieces that a block adds up together, for few tokens: two chunks each at most, four channels a thread.
inline constexpr int kGatheredPieces = rows_threads(RowsKind::kFewTokens) / 128;
constexpr int rows_piece(RowsKind kind) {  // most chunks of a piece there
  return kind == RowsKind::kFewTokens ? 2 : 4;
}
inline constexpr int kSenders = 8;  // warps that send first; the others receive from the start

// Private to one rank, in device memory. An operation is numbered by tickets: its blocks together add kTicket to each word,
// whatever their number, so the first ticket of the next operation follows without anybody resetting anything. Several words, since
// a hundred blocks that add to one would wait for each other. Above the count lies the epoch, which every change of peers advances,
// and the lock.
inline constexpr std::uint64_t kTicket = 1 << 12;
inline constexpr unsigned kTicketWords = 32;
struct alignas(64) Ticket {
  unsigned long long word;
};
// Blocks that have ended, by what they did.
struct alignas(64) Ended {
  unsigned long long both, sending, receiving;
};
inline constexpr int kEpochShift = 55;
inline constexpr std::uint32_t kEpochs = 256;
inline constexpr std::uint64_t kLocked = 1ull << 63;
NIXL_HD constexpr std::uint64_t operations_begun(std::uint64_t ticket) {
  return (ticket & ((1ull << kEpochShift) - 1)) / kTicket;
}
NIXL_HD constexpr std::uint32_t epoch_of(std::uint64_t ticket) {
  return static_cast<std::uint32_t>(ticket >> kEpochShift) % kEpochs;
}
struct State {
  Ticket tickets[kTicketWords];
  Ended ended[kTicketWords];             // together kTicket an operation
  unsigned long long taken;              // items of a combine of sums that were taken up, below its number (kTakenBits)
  unsigned long long redo;               // last operation + 1 that was repaired
  unsigned long long fault_op;           // operation + 1 that fault_view speaks of
  unsigned long long looking;            // threads that are reading a peer's control memory
  unsigned long long failed[kMaxRanks];  // operation + 1 in which this source failed
  std::int32_t fault_view[kMaxRanks];
  PeerVersion peers[kMaxRanks][2];
  PeerCells newest[kMaxRanks];  // of these, with the epoch they were written in
};

struct FaultRecord {
  std::uint64_t operation;
  std::uint64_t expected;
  std::uint64_t seen;
  std::int32_t rank;
  std::int32_t phase;
  unsigned long long sequence;  // written last: index + 1
};
// In pinned host memory: written by kernels, read by any host thread.
inline constexpr int kFaultRing = 1024;
struct HostPage {
  unsigned long long faults;       // records written so far
  unsigned long long input_error;  // (expert id << 8 | kind) + 1; 0: none
  FaultRecord ring[kFaultRing];
  std::uint8_t idle[kMaxRanks];  // set when no operation can use the memory of a detached rank any more
};
inline constexpr int kOutsideId = 1;
inline constexpr int kTooManyRows = 2;

inline constexpr int kSends = 1;
inline constexpr int kReceives = 2;

// Common to every operation.
struct Op {
  State* state = nullptr;
  HostPage* page = nullptr;      // by its device address
  std::uint8_t* data = nullptr;  // own data memory
  std::uint8_t* control = nullptr;
  PushLayout layout;
  PushControl words;
  std::int64_t timeout_ns = 0;
  std::uint32_t incarnation = 0;
  int rank = 0;
  int ranks = 0;       // of the call
  int all_ranks = 0;   // that there is room for
  int experts = 0;     // of a rank
  Divisor by_experts;  // of expert ids, which are below 2^16
  int phase = 0;       // nixl::ep::Phase
  int parts = kSends | kReceives;
};

struct RouteArgs {
  const void* topk_idx = nullptr;
  int index_bytes = 4;
  int num_tokens = 0;
  int topk = 0;
  int max_tokens = 0;
};

// Which tokens a block of a dispatch sends. The first block sends none, it counts: it is placed first, so that the counts leave before
// rows fill the links. Where there are at least twice as many others as tokens, `parts` of them share a token, each takes its part
// of the pieces. Worked out on the host: a division in a kernel's first instructions costs every block time.
struct TokenPlan {
  int parts = 1;
  int each = 0, more = 0;  // with one part: tokens of every block; so many blocks, the first, have one more
  Divisor by_parts;
};
inline TokenPlan plan_tokens(int tokens, int blocks, int wanted_parts) {
  TokenPlan plan;
  const int senders = blocks - 1;
  if (tokens == 0) return plan;
  if (2 * tokens <= senders) plan.parts = senders / tokens < wanted_parts ? senders / tokens : wanted_parts;
  plan.each = tokens / senders;
  plan.more = tokens % senders;
  plan.by_parts = Divisor(static_cast<std::uint32_t>(plan.parts));
  return plan;
}

// Where a block's parts of shared memory lie, in bytes.
struct DispatchShared {
  int peers = 0, base = 0, per_expert = 0, per_rank = 0, expert = 0, index = 0, message = 0, stage = 0, scratch = 0,
      total = 0;
  int stage_bytes = 0, scratch_words = 0;
};

struct DispatchOp {
  Op op;
  RouteArgs route;
  RowShape shape;
  TokenPlan plan;
  DispatchShared shared;
  int together = 0;  // tokens whose entries a warp looks at at once
  Divisor by_topk, by_pieces, by_others, by_cells;
  const std::uint16_t* x = nullptr;
  const float* weights = nullptr;
  bool with_weights = false;  // they travel; a rank without tokens has none to send and still receives them
  int hidden = 0;
  int payload = 0;
  int row_bytes = 0;    // of an output row
  int chunk_words = 0;  // scale words of a chunk
  int scale_words = 0;  // of a row
  std::uint8_t* recv_x = nullptr;
  std::uint32_t* recv_scales = nullptr;
  std::int32_t* recv_count = nullptr;
  std::int32_t* src_info = nullptr;
  std::int64_t* layout_range = nullptr;
  float* recv_weights = nullptr;
  std::uint8_t* recv_places = nullptr;
  std::uint8_t* records = nullptr;
  RecordLayout record;
  std::int32_t* recv_stats = nullptr;
  std::int64_t* wait_cost = nullptr;
};

// What travels in a combine, and where it lies at the owner.
enum class Rows {
  kSummed,   // the sum of a message's rows, in the sender's slot
  kInSlot,   // every row, in the sender's slot
  kByPlace,  // every row, by (token, place) in an area that all senders share
};
// Items of a combine of sums that warps take up, pieces of messages: bits that count them, and how many there may be; those that warps
// take in vain come on top.
inline constexpr int kTakenBits = 24;
inline constexpr std::int64_t kMostItems = 1 << 23;
// What warps add up at once in a combine of sums: units of a piece, and of a token.
struct UnitPlan {
  unsigned of_piece = 1, of_token = 1;
  Divisor by_piece, by_token, by_messages;  // the last: pieces of all messages of a token
};
struct CombineOp {
  Op op;
  RouteArgs route;
  RowShape shape;
  Rows rows = Rows::kSummed;
  unsigned split = 1;        // warps that share the entries of a message; 1 where rows are summed
  bool exact = false;        // sums in order of places; else rank by rank
  std::int64_t entries = 0;  // offset of the owners' weights in a slot
  UnitPlan units;
  Divisor by_pieces, by_others;  // pieces of a row; other ranks
  int gathered = 0;              // bytes of a row that a block adds up together, in shared memory; 0: it does not
  const std::uint16_t* x = nullptr;
  std::int64_t x_stride = 0;  // elements between rows
  int hidden = 0;
  const float* weights = nullptr;
  const float* row_weights = nullptr;  // of every row here, from dispatch; null: owners send weights first
  const std::uint8_t* records = nullptr;
  RecordLayout record;
  std::uint16_t* out = nullptr;
  std::int64_t* wait_cost = nullptr;
};

}  // namespace nixl::core::ep::gpu
