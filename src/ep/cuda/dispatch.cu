// Dispatch. A block sends the tokens of its range, once to every rank that holds one of their experts, as lines; all blocks
// together receive what others sent and put every row in its expert-major places. Where a source's rows begin follows from
// the counts that every source sends first.
#include "ep/cuda/device/dispatch_receive.cuh"
#include "ep/cuda/device/dispatch_send.cuh"

namespace nixl::core::ep {
namespace gpu {
namespace {

// One block writes everything again without the sources that failed.
template <int kLanes>
__device__ __noinline__ void repair(const DispatchOp& a, const Shared s) {
  receive_counts(a, s, 0, kThreads, kAll);
  write_ranges(a, s, 0, kThreads, true);
  receive_messages<kLanes>(a, s, 0, 0, 1);
  __syncthreads();
  const int span = (a.route.num_tokens + gridDim.x - 1) / gridDim.x;
  clear_counts(a.op, s.routes, 0, kThreads);
#pragma unroll 1
  for (int token = 0; token < a.route.num_tokens; token += span) {
    const int end = token + span < a.route.num_tokens ? token + span : a.route.num_tokens;
    __syncthreads();
    if (threadIdx.x == 0) {
      s.block->first_token = token;
      s.block->end_token = end;
    }
    if (threadIdx.x < 32) count_own(a.op, a.route, s.routes, token, end, nullptr);
    __syncthreads();
    if (threadIdx.x < 32) write_routes(a, s);
    place_own(a, s, kWarps, {0, a.shape.pieces, 0, a.shape.chunks}, end);
  }
}

}  // namespace
}  // namespace gpu

template <int kLanes>
__global__ void __launch_bounds__(gpu::kThreads, 1) dispatch(const __grid_constant__ gpu::DispatchOp a) {
  using namespace gpu;
  extern __shared__ __align__(128) std::uint8_t memory[];
  Shared s = carve(a, memory);
  const int warp = threadIdx.x / 32;
  const bool sends = a.op.parts & kSends, receives = a.op.parts & kReceives;
  const int most_ranks = a.op.ranks - 1 < a.route.topk ? a.op.ranks - 1 : a.route.topk;
  const unsigned at_once =
      kSenders > most_ranks ? kSenders / max(1, most_ranks) : 1;  // pieces that a block sends at once
  const Share share = share_of_tokens(a.route.num_tokens, (a.shape.pieces + at_once - 1) / at_once);
  const Span span = span_of(a.shape, share);
  const int begin = share.begin, end = share.end;
  // One block counts all tokens and tells the counts before rows fill the links: one that has no token where there is such a one.
  const bool counts = sends && blockIdx.x == (share.parts > 1 ? gridDim.x - 1 : 0);
  if (warp > kSenders) {
    clear_counts(a.op, s.routes, kCountFirst, kCountThreads);
    sync_some(kCounting, kCountThreads);
  }
  touch_parameters(a);
  if (warp != kSenders) wait_for_predecessor();
  if (warp < kSenders) {
    if (sends && begin < end) stage_token(a, span, begin, s.stage);
  } else if (warp == kSenders) {
    if (threadIdx.x % 32 == 0) {
      s.block->first_token = begin;
      s.block->end_token = end;
      s.block->counted = 0;
    }
    begin_operation(a.op, *s.block, s.peers);
    if (counts) arrive_some(kResting, kRestThreads);
  } else {
    if (counts) {
      count_before(a.op, a.route, s.routes, a.route.num_tokens, kCountFirst, kCountThreads, kCounting);
      sync_some(kResting, kRestThreads);  // the peers are known
      send_counts(a, s, kCountFirst, kCountThreads);
    }
    if (counts && begin < end) {
      sync_some(kCounting, kCountThreads);
      clear_counts(a.op, s.routes, kCountFirst, kCountThreads);
      sync_some(kCounting, kCountThreads);
    }
    if (begin < end) {
      count_before(a.op, a.route, s.routes, begin, kCountFirst, kCountThreads, kCounting);
      if (warp == kSenders + 1) count_own(a.op, a.route, s.routes, begin, end, a.op.page);
    }
  }
  __syncthreads();
  // Where few pieces are under way, a sending warp waits for one of them before it is known how many there are.
  const bool early = a.shape.per <= kEarlyPiece && a.op.ranks > 1;
  if (warp < kSenders) {
    if (sends) {
#pragma unroll 1
      for (int token = begin; token < end; ++token) {
        std::uint8_t* stage = s.stage + (token - begin) % 2 * s.stage_bytes;
        if (token != begin) {
          stage_token(a, span, token, stage);
          sync_some(kSending, kSendThreads);
        }
        push_token<kLanes>(a, s, token, stage, span);
      }
    }
    if (receives) {
      const unsigned number = blockIdx.x + warp * gridDim.x;
      const bool looks =
          early && number < static_cast<unsigned>(a.route.max_tokens * (a.op.ranks - 1) * a.shape.pieces);
      const Item item(a, looks ? number : 0);
      uint4 data[kEarlyPiece];
      const bool here = looks && await_piece<kLanes, kEarlyPiece, true>(a, s, item, data);
#pragma unroll 1
      while (!flag_set(s.block->counted)) __nanosleep(20);
      if (here) place_piece<kLanes>(a, s, item, data);
      place_own(a, s, kSenders, span, sends ? end - 2 : end);
    }
  } else if (receives) {
    receive_counts(a, s, kSendThreads, kRestThreads, kResting);
    if (blockIdx.x == 0) write_ranges(a, s, kSendThreads, kRestThreads, false);
    if (warp == kWarps - 1 && share.part == 0) write_routes(a, s);
  }
  if (!receives) return finish_sending(a.op, *s.block);
  receive_messages<kLanes>(a, s, early ? kSenders : 0, blockIdx.x, gridDim.x);
  if (finish_operation(a.op, *s.block, s.peers)) repair<kLanes>(a, s);
}

namespace gpu {
const void* dispatch_kernel(int lanes) {
  return lanes == 1 ? reinterpret_cast<const void*>(dispatch<1>) : reinterpret_cast<const void*>(dispatch<8>);
}
}  // namespace gpu
}  // namespace nixl::core::ep
