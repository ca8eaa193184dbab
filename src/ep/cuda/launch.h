// Kernels by address, and the shared memory that a launch of each needs. Host code includes this; so do the kernels, which
// find their parts of shared memory by the same walk.
#pragma once
#include "ep/cuda/protocol.h"

namespace nixl::core::ep::gpu {

inline constexpr int kPeerBytes = 88;  // of Peer in device/begin.cuh

inline DispatchShared make_dispatch_shared(const DispatchOp& a) {
  DispatchShared at;
  Walk walk;
  const auto take = [&](std::int64_t bytes, std::int64_t alignment) {
    return static_cast<int>(walk.take(bytes, alignment));
  };
  const std::int64_t experts = std::int64_t{a.op.ranks} * a.op.experts;
  const std::int64_t own = a.plan.each + (a.plan.more > 0 ? 1 : 0);
  at.stage_bytes = static_cast<int>(align_up<std::int64_t>(a.shape.chunks * (kChunkBytes + 4 * a.chunk_words), 128));
  at.scratch_words = (a.shape.piece_bytes - a.shape.per * kChunkBytes) / 4;
  at.stage = take(2 * at.stage_bytes, 128);
  at.scratch = take(4 * at.scratch_words * kWarps, 16);
  at.peers = take(kPeerBytes * a.op.ranks, 16);
  at.base = take(4 * experts, 16);
  at.per_expert = take(4 * experts, 16);
  at.per_rank = take(4 * a.op.ranks, 16);
  at.expert = take(4 * own * a.route.topk, 16);
  at.index = take(4 * own * a.route.topk, 16);
  at.message = take(4 * own * a.route.topk, 16);
  at.total = static_cast<int>(walk.total(16));
  return at;
}

inline constexpr int kOwnEntryBytes = 20;  // of OwnEntry in device/combine.cuh
struct CombineShared {
  std::int64_t peers = 0, own = 0, terms = 0, rows = 0, total = 0;
};
NIXL_HD inline CombineShared make_combine_shared(const CombineOp& a, int grid) {
  CombineShared at;
  Walk walk;
  const std::int64_t own = (a.route.num_tokens + grid - 1) / grid;
  at.peers = walk.take(kPeerBytes * a.op.ranks, 16);
  at.own = walk.take(kOwnEntryBytes * own * a.route.topk, 16);
  at.terms = walk.take(a.gathered ? 8 * a.route.topk : 0, 16);
  at.rows = walk.take(a.gathered * a.route.topk, 16);
  at.total = walk.total(16);
  return at;
}

inline UnitPlan plan_units(const RowShape& shape, int chunks, int ranks) {
  UnitPlan units;
  units.of_piece = (shape.per + chunks - 1) / chunks;
  units.of_token = units.of_piece * shape.pieces;
  units.by_piece = Divisor(units.of_piece);
  units.by_token = Divisor(units.of_token);
  units.by_messages = Divisor(ranks > 1 ? (ranks - 1) * shape.pieces : 1);
  return units;
}

// lanes: 1 or 8 (ep/layout/push.h). Each takes its Op struct by value.
const void* dispatch_kernel(int lanes);
const void* combine_sums_kernel(int lanes, bool few);
const void* combine_rows_kernel(int lanes, RowsKind kind);
const void* barrier_kernel();

// What a change of peers does, for the ranks listed in pinned host memory.
enum class Change : int { kMask, kUnmask, kAttach, kDetach };
struct PeerChange {
  Change change = Change::kMask;
  int rank = 0;
  std::uint8_t* data = nullptr;  // kAttach
  std::uint8_t* control = nullptr;
  std::uint32_t incarnation = 0;
  std::uint32_t first_sent = 0, first_expected = 0;
};
inline constexpr int kChangesInLaunch = 32;
struct ChangeOp {
  State* state = nullptr;
  std::uint8_t* control = nullptr;
  PushControl words;
  int all_ranks = 0;
  int count = 0;
  PeerChange changes[kChangesInLaunch];
};
struct QueryOp {
  const State* state = nullptr;
  std::int32_t* out = nullptr;
  int rank = 0;
  int num_ranks = 0;
};
struct IdleOp {  // waits until no operation can use the memory of a detached peer
  State* state = nullptr;
  std::int64_t limit_ns = 0;
  std::uint8_t* idle = nullptr;  // in pinned host memory: whether that was reached within the limit
};
const void* change_kernel();
const void* query_kernel();
const void* idle_kernel();

}  // namespace nixl::core::ep::gpu
