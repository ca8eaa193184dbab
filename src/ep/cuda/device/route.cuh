// Which messages a block's tokens become: for every (token, place) its place inside (source, expert), for every (token,
// destination) its message number. Both count over all earlier tokens, so every block counts those itself.
#pragma once
#include "ep/cuda/device/op.cuh"

namespace nixl::core::ep::gpu {

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

// `threads` of the block from `first` on.
__device__ __forceinline__ void clear_counts(const Op& op, const Routes& routes, int first, int threads) {
  const int tid = static_cast<int>(threadIdx.x) - first;
#pragma unroll 1
  for (int i = tid; i < op.ranks * op.experts; i += threads) routes.per_expert[i] = 0;
#pragma unroll 1
  for (int i = tid; i < op.ranks; i += threads) routes.per_rank[i] = 0;
}
// Adds tokens [0, end) to the counts. `threads` of the block from `first` on; barrier `name` is theirs.
__device__ __forceinline__ void count_before(const Op& op, const RouteArgs& route, const Routes& routes, int end,
                                             int first_thread, int threads, int name) {
  constexpr int kAhead = 8;  // loads under way together
  const int tid = static_cast<int>(threadIdx.x) - first_thread, lane = tid % 32, warps = threads / 32;
  const int num_experts = op.ranks * op.experts;
  // A warp takes as many whole tokens at a time as it has lanes for.
  const int together = 32u / static_cast<unsigned>(route.topk);
  const int token_of_lane = static_cast<unsigned>(lane) / static_cast<unsigned>(route.topk);
  const bool used = token_of_lane < together;
#pragma unroll 1
  for (int first = tid / 32 * together; first < end; first += kAhead * warps * together) {
    int ids[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int token = first + u * warps * together;
      const bool here = used && token + token_of_lane < end;
      ids[u] = here ? load_id(route, token * route.topk + lane, num_experts) : -1;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      if (first + u * warps * together >= end) break;
      const bool valid = ids[u] >= 0 && ids[u] < num_experts;
      const int rank = rank_of_expert(op, ids[u]);
      const unsigned same = __match_any_sync(~0u, valid ? rank << 5 | token_of_lane : -1 - lane);
      if (!valid) continue;
      atomicAdd(&routes.per_expert[ids[u]], 1);
      if (!(same & ((1u << lane) - 1))) atomicAdd(&routes.per_rank[rank], 1);
    }
  }
  sync_some(name, threads);
}

// Continues the counts over tokens [begin, end), which are numbered from 0 in expert, index and message. One warp.
__device__ __forceinline__ void count_own(const Op& op, const RouteArgs& route, const Routes& routes, int begin,
                                          int end, HostPage* page) {
  const int lane = threadIdx.x % 32;
  const int num_experts = op.ranks * op.experts;
  const unsigned before = (1u << lane) - 1;
#pragma unroll 1
  for (int token = begin; token < end; ++token) {
    const int id = lane < route.topk ? load_id(route, token * route.topk + lane, num_experts) : -1;
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

// The tokens of this block. Where there are at least twice as many blocks as tokens, `parts` blocks share a token and take
// every parts-th share of its work, block `part` of them.
struct Share {
  int begin, end, part, parts;
};
__device__ __forceinline__ Share share_of_tokens(int tokens, int wanted_parts) {
  const unsigned grid = gridDim.x, block = blockIdx.x, n = tokens;
  Share share{static_cast<int>(n * block / grid), static_cast<int>(n * (block + 1) / grid), 0, 1};
  if (n == 0 || 2 * n > grid) return share;
  const unsigned most = grid / n, parts = most < static_cast<unsigned>(wanted_parts) ? most : wanted_parts;
  const unsigned token = block / parts;
  share.part = static_cast<int>(block % parts);
  share.parts = static_cast<int>(parts);
  share.begin = static_cast<int>(token < n ? token : n);
  share.end = static_cast<int>(token < n ? token + 1 : n);
  return share;
}

}  // namespace nixl::core::ep::gpu
