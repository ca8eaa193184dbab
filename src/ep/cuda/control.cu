// Barrier, changes of peers, queries: kernels of one block.
#include "ep/cuda/device/op.cuh"
#include "ep/cuda/launch.h"

namespace nixl::core::ep {

// Every unmasked peer's header of this operation. Dynamic shared memory: a Peer for each rank.
__global__ void __launch_bounds__(gpu::kThreads, 1) barrier(const __grid_constant__ gpu::Op op) {
  using namespace gpu;
  extern __shared__ __align__(128) std::uint8_t memory[];
  __shared__ Block block;
  auto* peers = reinterpret_cast<Peer*>(memory);
  if (threadIdx.x < 32) begin_operation(op, block, peers);
  __syncthreads();
#pragma unroll 1
  for (int rank = threadIdx.x; rank < op.ranks; rank += blockDim.x)
    if (peers[rank].active && rank != op.rank) send_header(op, block, peers[rank], 0);
  __threadfence_system();
#pragma unroll 1
  for (int rank = threadIdx.x; rank < op.ranks; rank += blockDim.x)
    if (peers[rank].active && rank != op.rank) await_header(op, block, peers[rank], rank, nullptr);
  __syncthreads();
  finish_operation(op, block, peers);
}

namespace gpu {
namespace {

__device__ void apply_change(const ChangeOp& a, const PeerChange& what, std::uint64_t next) {
  PeerVersion now = latest_version(a.state->peers[what.rank], next);
  const auto header = [&](std::uint32_t slot) { return a.control + a.words.header_of(what.rank, slot); };
  const auto load = [&](std::uint32_t slot) {
    const uint4 cell = load_cell(header(slot));
    return PushHeader{cell.x, cell.y, cell.z, cell.w};
  };
  switch (what.change) {
    case Change::kAttach: {
      now = connected(next, what.incarnation, what.first_sent, what.first_expected);
      now.data = what.data;
      now.control = what.control;
      const PushHeader before = header_before(what.incarnation, what.first_expected);
      store_cell(header(flag_slot(before.count)),
                 make_uint4(before.incarnation, before.count, before.awaits, before.word));
      store_cell(header(flag_slot(what.first_expected)), make_uint4(0, 0, 0, 0));
      break;
    }
    case Change::kDetach:
      now.status = PeerStatus::kAbsent;
      break;
    case Change::kMask:
      if (now.status == PeerStatus::kActive) now.status = PeerStatus::kMasked;
      break;
    case Change::kUnmask:
      if (now.status == PeerStatus::kAbsent) break;
      // In the middle of an operation a peer that takes part in it stays as it is. Between operations one that was never masked
      // here is looked at too: it may have gone on without this rank.
      if (now.status == PeerStatus::kActive && operations_ended(*a.state, kReceives) < next) break;
      now = unmasked(now, load(0), load(1));
      break;
  }
  write_version(a.state->peers[what.rank], now);
}
__global__ void change_peers(const __grid_constant__ ChangeOp a) {
  const std::uint64_t next = lock_state(*a.state);
#pragma unroll 1
  for (int i = 0; i < a.count; ++i) apply_change(a, a.changes[i], next);
  unlock_state(*a.state, a.all_ranks);
}

__global__ void query_peers(const __grid_constant__ QueryOp a) {
#pragma unroll 1
  for (int rank = threadIdx.x; rank < a.num_ranks; rank += blockDim.x) {
    const PeerStatus status = version_at(a.state->peers[rank], ~0ull - 1).status;
    a.out[rank] = rank == a.rank || status == PeerStatus::kActive ? 0 : status == PeerStatus::kMasked ? 1 : -1;
  }
}

// After a detach: until nothing on this GPU can use the peer's memory any more, or the limit. Operations that begin after the
// detach see that the peer is absent. Those that began before: (1) where they were queued in the stream last used, they have ended
// as kernels, for this one follows them; (2) elsewhere (graphs are replayed in streams that nobody told us of) their blocks have
// all passed their last store to a peer (`sent`), and the pause is a hundred times what a store takes to leave; (3) who was
// looking at the peer's control memory has looked (look_at).
__global__ void await_idle(const __grid_constant__ IdleOp a) {
  const std::uint64_t begun = operations_begun(load_strong(&a.state->tickets[0].word));
  const std::uint64_t limit = wall_ns() + a.limit_ns;
  bool ended = false, unseen = false;
#pragma unroll 1
  while (!(ended && unseen) && wall_ns() < limit) {
    ended = operations_ended(*a.state, kSends) >= begun;
    unseen = unseen || load_strong(&a.state->looking) == 0;
    if (!(ended && unseen)) __nanosleep(2000);
  }
  const std::uint64_t pause = wall_ns() + 100'000;
#pragma unroll 1
  while (wall_ns() < pause) __nanosleep(2000);
  *a.idle = ended && unseen;
}

}  // namespace

const void* barrier_kernel() {
  return reinterpret_cast<const void*>(barrier);
}
const void* change_kernel() {
  return reinterpret_cast<const void*>(change_peers);
}
const void* query_kernel() {
  return reinterpret_cast<const void*>(query_peers);
}
const void* idle_kernel() {
  return reinterpret_cast<const void*>(await_idle);
}
}  // namespace gpu
}  // namespace nixl::core::ep
