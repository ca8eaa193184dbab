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
  wait_for_predecessor();
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
  const uint4 none = make_uint4(0, 0, 0, 0);
  std::uint8_t* headers[2] = {a.control + a.words.header_of(what.rank, 0), a.control + a.words.header_of(what.rank, 1)};
  switch (what.change) {
    case Change::kAttach:
      now = PeerVersion{};
      now.from = next;
      now.data = what.data;
      now.control = what.control;
      now.incarnation = what.incarnation;
      now.sent = now.expected = 1;
      now.status = PeerStatus::kMasked;
      store_cell(headers[0], none);
      store_cell(headers[1], none);
      break;
    case Change::kDetach: now.status = PeerStatus::kAbsent; break;
    case Change::kMask:
      if (now.status == PeerStatus::kActive) now.status = PeerStatus::kMasked;
      break;
    case Change::kUnmask: {
      if (now.status == PeerStatus::kAbsent) break;
      // In the middle of an operation a peer that takes part in it stays as it is.
      if (now.status == PeerStatus::kActive && load_strong(&a.state->done) / kTicket < next) break;
      // Also a peer that was never masked here may have gone on without this rank.
      const uint4 first = load_cell(headers[0]), second = load_cell(headers[1]);
      const std::uint32_t newest = newest_count(make_flag(first.x, first.y), make_flag(second.x, second.y), now.incarnation);
      const uint4 last = flag_slot(newest) ? second : first;
      const bool awaits_next = newest != 0 && !(last.w & kHeaderWithdrawn) && last.z == now.sent;
      now.expected = awaits_next ? newest : newest + 1;
      now.status = PeerStatus::kActive;
      break;
    }
  }
  write_version(a.state->peers[what.rank], now);
}
__global__ void change_peers(const __grid_constant__ ChangeOp a) {
  const std::uint64_t next = lock_state(*a.state);
#pragma unroll 1
  for (int i = 0; i < a.count; ++i) apply_change(a, a.changes[i], next);
  unlock_state(*a.state);
}

__global__ void query_peers(const __grid_constant__ QueryOp a) {
#pragma unroll 1
  for (int rank = threadIdx.x; rank < a.num_ranks; rank += blockDim.x) {
    const PeerStatus status = version_at(a.state->peers[rank], ~0ull - 1).status;
    a.out[rank] = rank == a.rank || status == PeerStatus::kActive ? 0 : status == PeerStatus::kMasked ? 1 : -1;
  }
}

__global__ void await_idle(const __grid_constant__ IdleOp a) {
  const std::uint64_t begun = (load_strong(&a.state->ticket) & ~kLocked) / kTicket;
  const std::uint64_t limit = wall_ns() + a.limit_ns;
#pragma unroll 1
  while (load_strong(&a.state->sent) / kTicket < begun && wall_ns() < limit) __nanosleep(2000);
  __nanosleep(100000);  // a receiver that looked at the peer just before the change has ended its look
}

}  // namespace

const void* barrier_kernel() { return reinterpret_cast<const void*>(barrier); }
const void* change_kernel() { return reinterpret_cast<const void*>(change_peers); }
const void* query_kernel() { return reinterpret_cast<const void*>(query_peers); }
const void* idle_kernel() { return reinterpret_cast<const void*>(await_idle); }
}  // namespace gpu
}  // namespace nixl::core::ep
