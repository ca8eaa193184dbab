// Which messages a block's tokens become: for every (token, place) its place inside (source, expert), for every (token,
// destination) its message number. Both count over all earlier tokens, so every block counts those itself.
#pragma once
#include "ep/cuda/device/op.cuh"

namespace nixl::core::ep::gpu {

// Threads of a block that count together, in whole warps, and the barrier that is theirs.
struct Crew {
  int thread;  // of `threads`: this one
  int threads;
  int barrier;
  __device__ __forceinline__ void meet() const { sync_some(barrier, threads); }
};

// In shared memory. `per_expert` and `per_rank` hold the counts so far.
struct Routes {
  int* per_expert;  // [ranks * experts]
  int* per_rank;    // [ranks]
  int* expert;      // [tokens of the block][topk] expert id; -1: none
  int* index;       // [tokens of the block][topk] index inside (source, expert); -1: this entry goes nowhere
  int* message;     // [tokens of the block][topk] at the first entry for a rank: message number; else -1
};

// The expert id at `at`: -1 for a negative one, num_experts for one that is too large.
__device__ __forceinline__ int load_id(const RouteArgs& route, int at, int num_experts) {
  const bool wide = route.index_bytes == 8;
  const int* words = static_cast<const int*>(route.topk_idx) + (wide ? 2 * std::int64_t{at} : at);
  const int low = __ldg(words), high = wide ? __ldg(words + 1) : low >> 31;
  return high < 0 ? -1 : high > 0 || low >= num_experts || low < 0 ? num_experts : low;
}

__device__ __forceinline__ void clear_counts(const Op& op, const Routes& routes, const Crew& crew) {
#pragma unroll 1
  for (int i = crew.thread; i < op.ranks * op.experts; i += crew.threads) routes.per_expert[i] = 0;
#pragma unroll 1
  for (int i = crew.thread; i < op.ranks; i += crew.threads) routes.per_rank[i] = 0;
  crew.meet();
}
// Adds tokens [0, end) to the counts, kAhead loads of a warp under way together.
template <int kAhead>
__device__ __forceinline__ void add_counts(const DispatchOp& a, const Routes& routes, int end, const Crew& crew) {
  const Op& op = a.op;
  const RouteArgs& route = a.route;
  const int lane = crew.thread % 32, warps = crew.threads / 32;
  const int num_experts = op.ranks * op.experts;
  // A warp takes as many whole tokens at a time as it has lanes for.
  const int together = a.together, token_of_lane = static_cast<int>(a.by_topk.quotient(lane));
  const bool used = token_of_lane < together;
#pragma unroll 1
  for (int first = crew.thread / 32 * together; first < end; first += kAhead * warps * together) {
    int ids[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int token = first + u * warps * together;
      const bool here = used && token + token_of_lane < end;
      ids[u] = here ? load_id(route, token * route.topk + lane, num_experts) : -1;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (u > 0 && first + u * warps * together >= end) break;
      const bool valid = ids[u] >= 0 && ids[u] < num_experts;
      const int rank = rank_of_expert(op, ids[u]);
      const unsigned same = __match_any_sync(~0u, valid ? rank << 5 | token_of_lane : -1 - lane);
      if (!valid) continue;
      atomicAdd(&routes.per_expert[ids[u]], 1);
      if (!(same & ((1u << lane) - 1))) atomicAdd(&routes.per_rank[rank], 1);
    }
  }
}
// The same, with no more copies of the loop's body than the tokens are worth: an instruction's first execution is what takes long.
__device__ __forceinline__ void count_before(const DispatchOp& a, const Routes& routes, int end, const Crew& crew) {
  constexpr int kFew = 256;
  if (end <= kFew)
    add_counts<1>(a, routes, end, crew);
  else
    add_counts<8>(a, routes, end, crew);
  crew.meet();
}

// The entry of this lane of an own token, as count_own needs it first.
__device__ __forceinline__ int load_own(const Op& op, const RouteArgs& route, int token) {
  const int lane = threadIdx.x % 32;
  return lane < route.topk ? load_id(route, token * route.topk + lane, op.ranks * op.experts) : -1;
}
// Continues the counts over tokens [begin, end), which are numbered from 0 in expert, index and message. `id`: load_own of the first.
// One warp.
__device__ __forceinline__ void count_own(const Op& op, const RouteArgs& route, const Routes& routes, int begin,
                                          int end, int id, HostPage* page) {
  const int lane = threadIdx.x % 32;
  const int num_experts = op.ranks * op.experts;
  const unsigned before = (1u << lane) - 1;
#pragma unroll 1
  for (int token = begin; token < end; ++token) {
    if (token != begin) id = load_own(op, route, token);
    const bool valid = id >= 0 && id < num_experts;
    if (id == num_experts && page) page->input_error = (static_cast<unsigned long long>(token) << 8 | kOutsideId) + 1;
    const int rank = rank_of_expert(op, id);
    const unsigned same_expert = __match_any_sync(~0u, valid ? id : -1 - lane);
    const unsigned same_rank = __match_any_sync(~0u, valid ? rank : -1 - lane);
    int index = -1, message = -1;
    if (valid) {
      index = routes.per_expert[id] + __popc(same_expert & before);
      if (!(same_rank & before)) message = routes.per_rank[rank];
      if (index >= route.max_tokens) {
        index = -1;
        if (page) page->input_error = (static_cast<unsigned long long>(id) << 8 | kTooManyRows) + 1;
      }
    }
    __syncwarp();
    if (valid && !(same_expert & before)) routes.per_expert[id] += __popc(same_expert);
    if (message >= 0) routes.per_rank[rank] += 1;
    if (lane < route.topk) {
      const int at = (token - begin) * route.topk + lane;
      routes.expert[at] = valid ? id : -1;
      routes.index[at] = index;
      routes.message[at] = message;
    }
    __syncwarp();
  }
}

// The tokens of this block, as planned.
struct Share {
  int begin, end, part;
};
__device__ __forceinline__ Share share_of_tokens(const TokenPlan& plan, int tokens) {
  if (blockIdx.x == 0) return {0, 0, 0};
  const int block = static_cast<int>(blockIdx.x) - 1;
  if (plan.parts == 1) {
    const int begin = block * plan.each + min(block, plan.more);
    return {begin, begin + plan.each + (block < plan.more ? 1 : 0), 0};
  }
  const int token = static_cast<int>(plan.by_parts.quotient(block));
  return {min(token, tokens), min(token + 1, tokens), block - token * plan.parts};
}

}  // namespace nixl::core::ep::gpu
