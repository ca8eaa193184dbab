// Dispatch. The first block counts all tokens and tells every rank. The others send the tokens of their range, once to every rank that
// holds one of their experts, as lines; all together receive what others sent and put every row in its expert-major places. Where a
// source's rows begin follows from the counts.
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
  clear_counts(a.op, s.routes, {static_cast<int>(threadIdx.x), kThreads, kAll});
#pragma unroll 1
  for (int token = 0; token < a.route.num_tokens; token += span) {
    const int end = token + span < a.route.num_tokens ? token + span : a.route.num_tokens;
    __syncthreads();
    if (threadIdx.x == 0) {
      s.block->first_token = token;
      s.block->end_token = end;
    }
    if (threadIdx.x < 32) count_own(a.op, a.route, s.routes, token, end, load_own(a.op, a.route, token), nullptr);
    __syncthreads();
    if (threadIdx.x < 32) write_routes(a, s);
    place_own(a, s, kWarps, {0, a.shape.pieces, 0, a.shape.chunks}, end);
  }
}

// What the counting warps do first: in the first block the counts of all tokens go on their way, in the others it is found out which
// messages the block's tokens become.
__device__ __forceinline__ void count_tokens(const DispatchOp& a, const Shared& s, const Share& share, const Crew& crew,
                                             bool first_block) {
  if (first_block) {
    count_before(a, s.routes, a.route.num_tokens, crew);
    send_counts(a, s, crew);
    return;
  }
  if (share.begin == share.end) return;
  const bool routes = crew.thread < 32;
  const int own = routes ? load_own(a.op, a.route, share.begin) : -1;
  count_before(a, s.routes, share.begin, crew);
  if (!routes) return;
  count_own(a.op, a.route, s.routes, share.begin, share.end, own, a.op.page);
  if (a.op.parts & kSends) arrive_some(kRouted, kSendThreads + 32);
}

// The sending warps' first half: the block's tokens in the payload's form, and on their way as soon as it is known who takes part.
template <int kLanes>
__device__ __forceinline__ void send_tokens(const DispatchOp& a, const Shared& s, const Share& share, const Span& span,
                                            int first_turn) {
#pragma unroll 1
  for (int token = share.begin; token < share.end; ++token) {
    const int ordinal = token - share.begin, local = ordinal * a.route.topk;
    std::uint8_t* stage = s.stage + ordinal % 2 * s.stage_bytes;
    stage_token(a, span, token, stage);
    sync_some(kSending, kSendThreads);
    int prepared = first_turn;
    std::uint32_t* meta = prepare_tail<kLanes>(a, s, stage, prepared);
    if (ordinal == 0) sync_some(kRouted, kSendThreads + 32);
    Turns turns(a, s, span, local);
    if (turns.more()) write_meta(a, s, token, local, turns.rank(), meta);
    if (ordinal == 0) sync_some(kAll, kThreads);  // the peers are known
#pragma unroll 1
    while (turns.more()) {
      const Peer& peer = s.peers[turns.rank()];
      if (peer.active) push_piece<kLanes>(a, s, stage, peer, turns.message(), turns.piece());
      turns.next();
      if (!turns.more()) break;
      if (prepared != turns.piece()) meta = prepare_tail<kLanes>(a, s, stage, prepared = turns.piece());
      write_meta(a, s, token, local, turns.rank(), meta);
    }
  }
}

// Their second half: a first piece, for which a warp waits before it is known how many there are where few are under way, then the
// rows that stay here.
template <int kLanes>
__device__ __forceinline__ void receive_first(const DispatchOp& a, const Shared& s, const Span& span, bool early) {
  const unsigned number = blockIdx.x + threadIdx.x / 32 * gridDim.x;
  const bool looks = early && number < static_cast<unsigned>(a.route.max_tokens * (a.op.ranks - 1) * a.shape.pieces);
  const Item item(a, looks ? number : 0);
  uint4 data[kEarlyPiece];
  const bool here = looks && await_piece<kLanes, kEarlyPiece, true>(a, s, item, data);
#pragma unroll 1
  while (!flag_set(s.block->counted)) __nanosleep(20);
  if (here) place_piece<kLanes>(a, s, item, data);
  place_own(a, s, kSenders, span, a.op.parts & kSends ? s.block->end_token - 2 : s.block->end_token);
}

}  // namespace
}  // namespace gpu

template <int kLanes>
__global__ void __launch_bounds__(gpu::kThreads, 1) dispatch(const __grid_constant__ gpu::DispatchOp a) {
  using namespace gpu;
  extern __shared__ __align__(128) std::uint8_t memory[];
  Shared s = carve(a, memory);
  const int warp = threadIdx.x / 32;
  const bool sends = a.op.parts & kSends, receives = a.op.parts & kReceives, first_block = blockIdx.x == 0;
  const Share share = share_of_tokens(a.plan, a.route.num_tokens);
  const Span span = span_of(a, share.part);
  const bool counts = warp != kSenders && (first_block ? sends : warp > kSenders);
  const Crew crew = counting_crew(first_block);
  if (counts) clear_counts(a.op, s.routes, crew);
  int first_turn = warp;  // the piece that a sending warp's first turn is about
#pragma unroll 1
  while (first_turn >= span.pieces) first_turn -= span.pieces;
  touch_parameters(a);
  if (warp == kSenders) {
    if (threadIdx.x % 32 == 0) {
      s.block->first_token = share.begin;
      s.block->end_token = share.end;
      s.block->counted = 0;
    }
    begin_operation(a.op, *s.block, s.peers);
    if (first_block && sends) arrive_some(kBegun, kThreads);
  } else {
    wait_for_predecessor();
  }
  if (counts) count_tokens(a, s, share, crew, first_block);
  const bool pushes = sends && warp < kSenders && share.begin < share.end;
  if (pushes)
    send_tokens<kLanes>(a, s, share, span, span.first_piece + first_turn);
  else
    sync_some(kAll, kThreads);
  const bool early = a.shape.per <= kEarlyPiece && a.op.ranks > 1;
  if (receives && warp < kSenders) receive_first<kLanes>(a, s, span, early);
  if (receives && warp >= kSenders) {
    receive_counts(a, s, kSendThreads, kRestThreads, kResting);
    if (first_block) write_ranges(a, s, kSendThreads, kRestThreads, false);
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
