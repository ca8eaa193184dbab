// How an operation begins: which one it is, who takes part; and how changes of peers keep out of its way.
//
// All blocks of an operation see the same peers in the same state: the version valid from an operation on is fixed before
// that operation's first ticket is drawn (protocol.h).
#pragma once
#include "ep/cuda/device/line.cuh"
#include "ep/cuda/protocol.h"

namespace nixl::core::ep::gpu {

// A peer as this operation sees it, in shared memory.
struct Peer {
  std::uint8_t* remote;       // the slot this operation writes in the peer's data memory
  std::uint8_t* exact;        // the peer's exact areas
  std::uint8_t* control;      // its control memory
  const std::uint8_t* local;  // the slot it writes in ours
  std::uint32_t tag_out, tag_in;
  std::uint32_t incarnation, sent, expected;
  std::uint32_t fresh;   // first operation since it was unmasked
  int messages;          // that it sent in this operation
  std::uint32_t parity;  // of its operation number
  std::uint32_t active;  // takes part; 0 once it failed here
};

static_assert(sizeof(Peer) <= 88);

__device__ __forceinline__ int rank_of_expert(const Op& op, int expert) {
  return static_cast<int>(op.by_experts.quotient(expert));
}

struct Block {
  std::uint64_t number;    // of this operation
  unsigned share;          // this block's part of kTicket
  int failed;              // a wait of this block ran out
  std::uint64_t fault_op;  // as the operation found it
  int cursor;              // next item of this block
  int most_messages;
  int counted;  // whether the messages of peers are known
  int first_token, end_token;
};

__device__ __forceinline__ unsigned long long load_strong(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.acquire.gpu.global.u64 %0,[%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ PeerVersion load_version(const PeerVersion* at) {
  union {
    unsigned long long words[8];
    PeerVersion version;
  } copy{};
#pragma unroll
  for (int i = 0; i < 8; i += 2)
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1},[%2];"
                 : "=l"(copy.words[i]), "=l"(copy.words[i + 1])
                 : "l"(reinterpret_cast<const unsigned long long*>(at) + i)
                 : "memory");
  return copy.version;
}
// The version that holds for an operation. Of two, one at least is not being written.
__device__ __forceinline__ PeerVersion version_at(const PeerVersion (&versions)[2], std::uint64_t number) {
  const PeerVersion a = load_version(&versions[0]), b = load_version(&versions[1]);
  return version_for(a, b, number);
}
__device__ __forceinline__ PushHeader load_header(const Op& op, int rank, std::uint32_t slot) {
  const uint4 cell = load_cell(op.control + op.words.header_of(rank, slot));
  return {cell.x, cell.y, cell.z, cell.w};
}

// Changes of peers happen while no operation is between its first and its last ticket. Who locks the first word tries the others.
__device__ inline bool lock_word(Ticket& ticket, std::uint64_t& begun, bool first) {
  const unsigned long long seen = load_strong(&ticket.word);
  if (seen % kTicket != 0 || (seen & kLocked) || (!first && operations_begun(seen) != begun)) return false;
  begun = operations_begun(seen);
  return atomicCAS(&ticket.word, seen, seen | kLocked) == seen;
}
__device__ inline std::uint64_t lock_state(State& state) {
#pragma unroll 1
  for (;;) {
    std::uint64_t begun = 0;
    unsigned locked = 0;
#pragma unroll 1
    while (locked < kTicketWords && lock_word(state.tickets[locked], begun, locked == 0)) ++locked;
    if (locked == kTicketWords) {
      __threadfence();
      return begun;
    }
#pragma unroll 1
    while (locked > 0) atomicAnd(&state.tickets[--locked].word, ~kLocked);
    __nanosleep(200);
  }
}
// Shows the newest versions to the operations to come, in a new epoch.
__device__ inline void unlock_state(State& state, int all_ranks) {
  const std::uint32_t before = epoch_of(load_strong(&state.tickets[0].word)), epoch = (before + 1) % kEpochs;
#pragma unroll 1
  for (int rank = 0; rank < all_ranks; ++rank) {
    const PeerCells newest = cells_of(version_at(state.peers[rank], ~0ull - 1), epoch);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const PeerCell& cell = newest.cells[i];
      store_cell(&state.newest[rank].cells[i], make_uint4(cell.low, cell.high, cell.epoch, cell.word));
    }
  }
  __threadfence();
  const unsigned long long above = kLocked | static_cast<unsigned long long>(before) << kEpochShift;
  const unsigned long long change = (static_cast<unsigned long long>(epoch) << kEpochShift) - above;
#pragma unroll 1
  for (Ticket& ticket : state.tickets) atomicAdd(&ticket.word, change);
}
// The newest version, advanced to operation `next`.
__device__ inline PeerVersion latest_version(const PeerVersion (&versions)[2], std::uint64_t next) {
  return advanced(version_at(versions, ~0ull - 1), next);
}
__device__ inline void write_version(PeerVersion (&versions)[2], const PeerVersion& version) {
  const int place = place_for(versions[0].from, versions[1].from, version.from);
  auto* from = reinterpret_cast<unsigned long long*>(&versions[place].from);
  atomicExch(from, ~0ull);
  __threadfence();
  PeerVersion copy = version;
  copy.from = ~0ull;
  versions[place] = copy;
  __threadfence();
  atomicExch(from, version.from);
}

// Fills in `peer` for operation `number` from the version that holds for it.
__device__ __forceinline__ void see_peer(const Op& op, std::uint64_t number, int rank, const PeerVersion& now,
                                         Peer& peer) {
  const auto past = static_cast<std::uint32_t>(number - now.from);
  peer.active = now.status == PeerStatus::kActive;
  peer.incarnation = now.incarnation;
  peer.sent = now.sent + past;
  peer.expected = now.expected + past;
  peer.fresh = past == 0;
  peer.remote = now.data + op.layout.slot_of(op.rank, flag_slot(peer.sent));
  peer.exact = now.data;
  peer.control = now.control;
  peer.local = op.data + op.layout.slot_of(rank, flag_slot(peer.expected));
  peer.tag_out = make_tag(op.incarnation, peer.sent);
  peer.tag_in = make_tag(peer.incarnation, peer.expected);
  peer.messages = 0;
  peer.parity = 0;
}

// An instruction that a launch executes for the first time takes several times as long as later, and so does the first use of a
// parameter: what needs nothing that the kernel before wrote is done before this.
//
// The kernel before this one has ended and what it wrote is visible.
__device__ __forceinline__ void wait_for_predecessor() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// The next kernel may be placed.
__device__ __forceinline__ void launch_successor() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
// Brings the parameters of a launch into the cache for constants.
template <typename T>
__device__ __forceinline__ void touch_parameters(const T& a) {
#pragma unroll
  for (unsigned i = 0; i < sizeof(T); i += 64) asm volatile("" ::"r"(reinterpret_cast<const unsigned*>(&a)[i / 4]));
}

// What a block draws: from which word, how much it adds, worked out while the kernel before still runs.
struct Draw {
  Ticket* ticket;
  unsigned long long part;
};
__device__ __forceinline__ Draw draw_of_block(State& state) {
  const unsigned word = blockIdx.x % kTicketWords, drawing = (gridDim.x - word + kTicketWords - 1) / kTicketWords;
  constexpr auto all = static_cast<unsigned>(kTicket);
  return {&state.tickets[word], all / drawing + (blockIdx.x < kTicketWords ? all % drawing : 0)};
}
// Adds the block's part to its word, and what a grid of few blocks owes to words that no block draws from.
__device__ __forceinline__ unsigned long long draw_ticket(State& state, const Draw& draw) {
  unsigned long long before;
  asm volatile("atom.add.relaxed.gpu.global.u64 %0,[%1],%2;"
               : "=l"(before)
               : "l"(&draw.ticket->word), "l"(draw.part)
               : "memory");
#pragma unroll 1
  for (unsigned other = blockIdx.x + gridDim.x; other < kTicketWords; other += gridDim.x)
    asm volatile("red.add.relaxed.gpu.global.u64 [%0],%1;" ::"l"(&state.tickets[other].word), "l"(kTicket) : "memory");
  return before;
}
// Counts this block among those that have ended. Nobody waits for it, and nothing is ordered by it: who needs what lies before adds
// a pause (elect_repair).
__device__ __forceinline__ void end_block(const Op& op, const Block& block) {
  Ended& ended = op.state->ended[blockIdx.x % kTicketWords];
  unsigned long long* at = op.parts == (kSends | kReceives) ? &ended.both
                           : op.parts & kSends              ? &ended.sending
                                                            : &ended.receiving;
  asm volatile("red.add.relaxed.gpu.global.u64 [%0],%1;" ::"l"(at), "l"(std::uint64_t{block.share}) : "memory");
}
// Operations all of whose blocks have passed their last store to a peer (sent) or their last wait (received).
__device__ inline std::uint64_t operations_ended(const State& state, int part) {
  std::uint64_t sum = 0;
#pragma unroll 1
  for (const Ended& ended : state.ended)
    sum += load_strong(&ended.both) + load_strong(part == kSends ? &ended.sending : &ended.receiving);
  return sum / kTicket;
}
__device__ __forceinline__ PeerCells load_newest(const State& state, int rank) {
  PeerCells newest;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 cell = load_cell(&state.newest[rank].cells[i]);
    newest.cells[i] = {cell.x, cell.y, cell.z, cell.w};
  }
  return newest;
}
// What a block can know of an operation while the kernel before still runs: which one it will be, if nothing changes meanwhile, and
// the peers as they are shown. One warp; begin_operation confirms it.
struct Ahead {
  Draw draw;
  unsigned long long ticket;
  PeerCells newest;
  bool filled;  // this lane's peer
};
__device__ __forceinline__ Ahead look_ahead(const Op& op, Peer* peers) {
  const int lane = threadIdx.x % 32;
  Ahead a = {draw_of_block(*op.state), 0, {}, false};
  asm volatile("" : "+l"(a.draw.ticket), "+l"(a.draw.part));
  if (!(op.parts & kSends)) return a;
  if (lane == 0)
    asm volatile("ld.relaxed.gpu.global.u64 %0,[%1];" : "=l"(a.ticket) : "l"(&a.draw.ticket->word) : "memory");
  if (lane < op.ranks) a.newest = load_newest(*op.state, lane);
  a.ticket = __shfl_sync(~0u, a.ticket, 0);
  if (lane >= op.ranks || (a.ticket & kLocked) || !a.newest.of(epoch_of(a.ticket))) return a;
  see_peer(op, operations_begun(a.ticket), lane, version_of(a.newest), peers[lane]);
  a.filled = true;
  return a;
}
__device__ __forceinline__ bool same_cells(const PeerCells& a, const PeerCells& b) {
  std::uint32_t other = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    other |= (a.cells[i].low ^ b.cells[i].low) | (a.cells[i].high ^ b.cells[i].high) |
             (a.cells[i].epoch ^ b.cells[i].epoch) | (a.cells[i].word ^ b.cells[i].word);
  return other == 0;
}
// Waits for the kernel before, draws this block's ticket and looks at the peers, both at once. What is shown of them holds if it is of
// the ticket's epoch, and what was seen ahead if nothing has changed since; else the versions are looked through. One warp.
// `parities`: also finds out what the parity of each peer's operation is, from its header of the one before; kUnknownParity
// where there is none.
__device__ inline void begin_operation(const Op& op, Block& block, Peer* peers, bool parities = false) {
  const int lane = threadIdx.x % 32;
  if (lane == 0) {
    block.cursor = 0;
    block.failed = 0;
    block.share = static_cast<unsigned>(kTicket) / gridDim.x;
    if (blockIdx.x == 0) block.share += static_cast<unsigned>(kTicket) % gridDim.x;
  }
  const Ahead ahead = look_ahead(op, peers);
  wait_for_predecessor();
  const bool sends = op.parts & kSends;
  unsigned long long ticket = 0;
  if (lane == 0) ticket = sends ? draw_ticket(*op.state, ahead.draw) : load_strong(&ahead.draw.ticket->word);
  PeerCells newest = {};
  if (lane < op.ranks) newest = load_newest(*op.state, lane);
  uint4 even = {}, odd = {};  // headers of the lane's first rank
  if (parities && lane < op.ranks) {
    even = load_cell(op.control + op.words.header_of(lane, 0));
    odd = load_cell(op.control + op.words.header_of(lane, 1));
  }
  unsigned long long fault_op = 0;
  if (lane == 0)
    asm volatile("ld.relaxed.gpu.global.u64 %0,[%1];" : "=l"(fault_op) : "l"(&op.state->fault_op) : "memory");
  ticket = __shfl_sync(~0u, ticket, 0);
  launch_successor();
  const std::uint64_t number = operations_begun(ticket) - (sends ? 0 : 1);
  if (lane == 0) {
    block.fault_op = fault_op;
    block.number = number;
  }
  const bool known = ahead.filled && (ticket ^ ahead.ticket) < kTicket && same_cells(newest, ahead.newest);
  if (!parities && __all_sync(~0u, known || lane >= op.ranks) && op.ranks <= 32) return;
  const bool locked = sends && (ticket & kLocked);
  if (locked)
#pragma unroll 1
    while (load_strong(&ahead.draw.ticket->word) & kLocked)
      ;
#pragma unroll 1
  for (int rank = lane; rank < op.ranks; rank += 32) {
    if (rank >= 32) newest = load_newest(*op.state, rank);
    const bool holds = sends && !locked && newest.of(epoch_of(ticket));
    if (rank >= 32 || !known)
      see_peer(op, number, rank, holds ? version_of(newest) : version_at(op.state->peers[rank], number), peers[rank]);
    if (!parities) continue;
    const Peer& peer = peers[rank];
    const int slot = flag_slot(peer.expected - 1);
    uint4 last = make_uint4(slot ? odd.x : even.x, slot ? odd.y : even.y, 0, slot ? odd.w : even.w);
    if (rank >= 32) last = load_cell(op.control + op.words.header_of(rank, slot));
    const PushHeader header{last.x, last.y, last.z, last.w};
    peers[rank].parity = HeaderBefore{header, peer.incarnation, peer.expected, peer.fresh != 0}.parity();
  }
}

}  // namespace nixl::core::ep::gpu
