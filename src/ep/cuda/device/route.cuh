// Which messages a block's tokens become: for every (token, place) its place inside (source, expert), for every (token,
// destination) its message number. Both count over all earlier tokens, so every block counts those itself.
#pragma once
#include "ep/cuda/device/op.cuh"

namespace nixl::core::ep::gpu {

// In shared memory. `per_expert` and `per_rank` hold the counts so far.
struct Routes {
  int* per_expert;  // [ranks * experts]
  int* per_rank;    // [ranks]
  int* index;       // [tokens of the block][topk] index inside (source, expert); -1: this entry goes nowhere
  int* message;     // [tokens of the block][topk] at the first entry for a rank: message number; else -1
};

__device__ __forceinline__ long long load_id(const RouteArgs& route, std::int64_t at) {
  return route.index_bytes == 8 ? static_cast<const long long*>(route.topk_idx)[at]
                                : static_cast<const int*>(route.topk_idx)[at];
}

// Zeroes the counts and counts tokens [0, end). Threads [0, threads) of the block; barrier `name` is theirs.
__device__ inline void count_before(const Op& op, const RouteArgs& route, Routes& routes, int end, int threads, int name) {
  const int tid = threadIdx.x;
  const int num_experts = op.ranks * op.experts;
#pragma unroll 1
  for (int i = tid; i < num_experts; i += threads) routes.per_expert[i] = 0;
#pragma unroll 1
  for (int i = tid; i < op.ranks; i += threads) routes.per_rank[i] = 0;
  sync_some(name, threads);
  const int topk = route.topk;
#pragma unroll 1
  for (int token = tid; token < end; token += threads) {
    unsigned long long seen = 0;
#pragma unroll 1
    for (int first = 0; first < topk; first += 8) {
      int ids[8];
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        const long long id = first + q < topk ? load_id(route, std::int64_t{token} * topk + first + q) : -1;
        ids[q] = id >= 0 && id < num_experts ? static_cast<int>(id) : -1;
      }
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        if (ids[q] < 0) continue;
        atomicAdd(&routes.per_expert[ids[q]], 1);
        const int rank = ids[q] / op.experts;
        bool again;
        if (op.ranks <= 64) {
          again = seen >> rank & 1;
          seen |= 1ull << rank;
        } else {
          again = false;
#pragma unroll 1
          for (int j = 0; j < first + q && !again; ++j) {
            const long long id = load_id(route, std::int64_t{token} * topk + j);
            again = id >= 0 && id < num_experts && static_cast<int>(id) / op.experts == rank;
          }
        }
        if (!again) atomicAdd(&routes.per_rank[rank], 1);
      }
    }
  }
  sync_some(name, threads);
}

// Continues the counts over tokens [begin, end), which are numbered from 0 in index and message. One warp.
__device__ inline void count_own(const Op& op, const RouteArgs& route, Routes& routes, int begin, int end, HostPage* page) {
  const int lane = threadIdx.x % 32;
  const int num_experts = op.ranks * op.experts;
#pragma unroll 1
  for (int token = begin; token < end; ++token) {
    const long long id = lane < route.topk ? load_id(route, std::int64_t{token} * route.topk + lane) : -1;
    const bool valid = id >= 0 && id < num_experts;
    if (id >= num_experts && page) page->input_error = (static_cast<unsigned long long>(id) << 8 | kOutsideId) + 1;
    const int expert = valid ? static_cast<int>(id) : -1 - lane;
    const int rank = valid ? expert / op.experts : -1 - lane;
    const unsigned same_expert = __match_any_sync(~0u, expert);
    const unsigned same_rank = __match_any_sync(~0u, rank);
    const unsigned before = (1u << lane) - 1;
    int index = -1, message = -1;
    if (valid) {
      index = routes.per_expert[expert] + __popc(same_expert & before);
      if (index >= route.max_tokens) {
        index = -1;
        if (page) page->input_error = (static_cast<unsigned long long>(expert) << 8 | kTooManyRows) + 1;
      }
      if (!(same_rank & before)) message = routes.per_rank[rank];
    }
    __syncwarp();
    if (valid && !(same_expert & before)) routes.per_expert[expert] += __popc(same_expert);
    if (message >= 0) routes.per_rank[rank] += 1;
    if (lane < route.topk) {
      routes.index[(token - begin) * route.topk + lane] = index;
      routes.message[(token - begin) * route.topk + lane] = message;
    }
    __syncwarp();
  }
}

}  // namespace nixl::core::ep::gpu
