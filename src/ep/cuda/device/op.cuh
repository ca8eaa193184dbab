// How an operation goes on: waiting with a deadline, what happens when a peer fails, the end.
#pragma once
#include "ep/cuda/device/begin.cuh"

namespace nixl::core::ep::gpu {

// While a rank waits it says for whom, and shows by a changing beat that it is alive: whoever waits for this rank meanwhile
// is patient up to twice the limit instead of taking it for dead.
struct Patience {
  std::uint64_t start = 0;  // of this wait: a wait that begins after another one ran out has its own time
  std::uint64_t next_look = 0;
  std::uint64_t limit = 0;
  std::uint32_t beat = 0;
};

// The word in which `rank` shows that it waits, and for whom; false: it is not connected any more. Who unmaps its memory first
// makes it absent, then waits until nobody is looking (await_idle): one of the two sees the other.
static __device__ __noinline__ bool look_at(const Op& op, int rank, unsigned long long& held) {
  atomicAdd(&op.state->looking, 1ull);
  __threadfence();
  const PeerVersion latest = version_at(op.state->peers[rank], ~0ull - 1);
  const bool there = latest.status != PeerStatus::kAbsent;
  held = there ? *reinterpret_cast<volatile unsigned long long*>(latest.control) : 0;
  __threadfence();
  atomicAdd(&op.state->looking, ~0ull);
  return there;
}
// Whether waiting is in vain: the peer says so in this operation's header, or took back that of the one before.
static __device__ __noinline__ bool past_operation(const Op& op, const Block& block, int rank) {
  const PeerVersion then = version_at(op.state->peers[rank], block.number);
  const std::uint32_t expected = expected_in(then, block.number);
  const PushHeader header = load_header(op, rank, flag_slot(expected));
  if (is_past(header, then, block.number)) return true;
  const PushHeader before = load_header(op, rank, flag_slot(expected - 1));
  return !names_operation(header, then, block.number) &&
         HeaderBefore{before, then.incarnation, expected, block.number == then.from}.withdrawn();
}

// Whether to go on waiting for `rank`. Called again and again while something of it is missing.
static __device__ __noinline__ bool keep_waiting(const Op& op, const Block& block, int rank, Patience& patience) {
  const std::uint64_t now = wall_ns();
  const std::uint64_t timeout = op.timeout_ns;
  if (patience.start == 0) patience.start = now;
  const std::uint64_t waited = now - patience.start;
  if (patience.limit == 0) patience.limit = timeout == 0 ? 1 : timeout;
  if (timeout == 0) return false;
  if (now < patience.next_look) return true;
  // Often enough to learn in a millisecond that others gave it up, and exactly when the time is over.
  patience.next_look = now + (timeout / 32 < 1'000'000 ? timeout / 32 : 1'000'000);
  const std::uint64_t end = patience.start + patience.limit;
  if (now < end && end < patience.next_look) patience.next_look = end;
  if (load_strong(&op.state->failed[rank]) == block.number + 1) return false;
  if (version_at(op.state->peers[rank], ~0ull - 1).status != PeerStatus::kActive) return false;
  if (past_operation(op, block, rank)) return false;
  if (waited < timeout / 4) return true;
  auto* own = reinterpret_cast<volatile unsigned long long*>(op.control);
  *own = static_cast<unsigned long long>(rank + 1) << 32 | static_cast<std::uint32_t>(now >> 10);
  if (waited >= timeout / 2 && rank != op.rank) {
    unsigned long long held;
    if (!look_at(op, rank, held)) return false;
    const auto beat = static_cast<std::uint32_t>(held);
    const auto by = static_cast<std::uint32_t>(held >> 32);
    if (patience.beat != 0 && beat != patience.beat && by != 0 && by != static_cast<std::uint32_t>(op.rank) + 1) {
      const std::uint64_t longer = waited + timeout / 8;
      patience.limit = longer > 2 * timeout ? 2 * timeout : longer > patience.limit ? longer : patience.limit;
    }
    patience.beat = beat == 0 ? 1 : beat;
  }
  return waited < patience.limit;
}
// For loops of any thread: mostly a counter, now and then a look at the clock. The counter is apart, so that it can be a register.
__device__ __forceinline__ bool patient(const Op& op, const Block& block, int rank, unsigned& polls,
                                        Patience& patience) {
  if (++polls % 64 != 0 && op.timeout_ns != 0) return true;
  return keep_waiting(op, block, rank, patience);
}

// The same for a warp, all of whose lanes call it and get the same answer.
__device__ __forceinline__ bool warp_patient(const Op& op, const Block& block, int rank, unsigned& polls,
                                             Patience& patience) {
  if (++polls % 64 != 0 && op.timeout_ns != 0) return true;
  return __all_sync(~0u, keep_waiting(op, block, rank, patience));
}

static __device__ __noinline__ void fail_peer(const Op& op, Block& block, Peer& peer, int rank) {
  atomicMax(&op.state->failed[rank], block.number + 1);
  peer.active = 0;
  block.failed = 1;
  __threadfence();
}

// The header of a source: its flag, how many messages it sent, the parity of its operation. One thread.
__device__ inline bool accept_header(const Op& op, Peer& peer, int rank) {
  const uint4 cell = load_cell(op.control + op.words.header_of(rank, flag_slot(peer.expected)));
  if (cell.x != peer.incarnation || cell.y != peer.expected || (cell.w & kHeaderWithdrawn)) return false;
  peer.messages = static_cast<int>(cell.w & (kHeaderWithdrawn - 1));
  peer.parity = cell.w >> 31;
  return true;
}
static __device__ __noinline__ bool await_header(const Op& op, Block& block, Peer& peer, int rank,
                                                 std::int64_t* wait_cost) {
  Patience patience;
  unsigned polls = 0;
  const long long begin = clock64();
#pragma unroll 1
  while (!accept_header(op, peer, rank)) {
    if (!patient(op, block, rank, polls, patience)) {
      fail_peer(op, block, peer, rank);
      peer.messages = 0;
      break;
    }
  }
  if (wait_cost && blockIdx.x == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(wait_cost + rank), clock64() - begin);
  return peer.active;
}
__device__ inline void send_header(const Op& op, const Block& block, const Peer& peer, int messages) {
  store_cell(peer.control + op.words.header_of(op.rank, flag_slot(peer.sent)),
             make_uint4(op.incarnation, peer.sent, peer.expected,
                        static_cast<std::uint32_t>(messages) | (block.number & 1 ? kHeaderParity : 0)));
}

// Masks the sources that failed in this operation and tells the host. One thread of the grid. Nobody is detached under the
// lock, so a withdrawal is never written to memory that is gone.
static __device__ __noinline__ void report_failed(const Op& op, const Block& block) {
  State& state = *op.state;
  lock_state(state);
#pragma unroll 1
  for (int rank = 0; rank < kMaxRanks; ++rank) state.fault_view[rank] = 0;
#pragma unroll 1
  for (int rank = 0; rank < op.ranks; ++rank) {
    if (load_strong(&state.failed[rank]) != block.number + 1) continue;
    const PeerVersion then = version_at(state.peers[rank], block.number);
    const Failure failure = failed_in(block.number, then, version_at(state.peers[rank], ~0ull - 1), op.incarnation);
    if (failure.withdrawn) {
      const PushHeader& header = failure.header;
      store_cell(then.control + op.words.header_of(op.rank, flag_slot(header.count)),
                 make_uint4(header.incarnation, header.count, header.awaits, header.word));
    }
    if (!failure.told) continue;
    write_version(state.peers[rank], failure.version);
    state.fault_view[rank] = 1;
    const std::uint32_t expected = expected_in(then, block.number);
    const PushHeader seen = load_header(op, rank, flag_slot(expected));
    const unsigned long long index = op.page->faults;
    FaultRecord& record = op.page->ring[index % kFaultRing];
    record.operation = block.number;
    record.expected = make_flag(then.incarnation, expected);
    record.seen = make_flag(seen.incarnation, seen.count);
    record.rank = rank;
    record.phase = op.phase;
    record.sequence = index + 1;
    __threadfence_system();
    *reinterpret_cast<volatile unsigned long long*>(&op.page->faults) = index + 1;
  }
  state.fault_op = block.number + 1;
  unlock_state(state, op.all_ranks);
}

// End of a block that only sends, all threads.
__device__ inline void finish_sending(const Op& op, const Block& block) {
  __syncthreads();
  if (threadIdx.x == 0) end_block(op, block);
}

// Clears what an earlier operation left in the fault view; a failure of this one writes it anew.
static __device__ __noinline__ void clear_faults(const Op& op, const Block& block) {
#pragma unroll 1
  for (int rank = 0; rank < kMaxRanks; ++rank)
    if (load_strong(&op.state->failed[rank]) != block.number + 1) op.state->fault_view[rank] = 0;
  op.state->fault_op = 0;
}

// After a wait of this block ran out, all threads. Exactly one block of the grid gets true: it repairs the outputs, alone,
// after all others have ended, leaving the failed sources out, so that a source is there completely or not at all.
static __device__ __noinline__ bool elect_repair(const Op& op, Block& block, Peer* peers) {
  State& state = *op.state;
  if (threadIdx.x == 0) {
    const bool elected = atomicMax(&state.redo, block.number + 1) < block.number + 1;
    if (elected) {
      const std::uint64_t limit = wall_ns() + 4 * op.timeout_ns + 2'000'000'000ull;
#pragma unroll 1
      while (operations_ended(state, kReceives) <= block.number && wall_ns() < limit) __nanosleep(500);
#pragma unroll 1
      for (int i = 0; i < 100; ++i) __nanosleep(1000);  // what those blocks wrote last has landed
      __threadfence();
      report_failed(op, block);
    }
    block.failed = elected;
  }
  __syncthreads();
  if (!block.failed) return false;
#pragma unroll 1
  for (int rank = threadIdx.x; rank < op.ranks; rank += blockDim.x) {
    if (load_strong(&state.failed[rank]) == block.number + 1) {
      peers[rank].active = 0;
      peers[rank].messages = 0;
    } else if (peers[rank].active && rank != op.rank) {
      accept_header(op, peers[rank], rank);
    }
  }
  __syncthreads();
  return true;
}
// End of a receiving block, all threads.
__device__ __forceinline__ bool finish_operation(const Op& op, Block& block, Peer* peers) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0 && block.fault_op != 0 && !block.failed) clear_faults(op, block);
    end_block(op, block);
  }
  return block.failed != 0 && elect_repair(op, block, peers);
}

}  // namespace nixl::core::ep::gpu
