// Combine with sums on the way: the rank that holds a token's rows weighs them, adds them up and sends the sum to the token's
// owner, which adds what comes. Which rows, and to whom, dispatch has recorded; so nobody asks and nobody counts. The owner sends
// the weights first, unless they came with dispatch; a row that is alone does not wait for them, the owner weighs it.
#include "ep/cuda/device/sum_unit.cuh"

namespace nixl::core::ep {
namespace gpu {
namespace {

enum Barrier { kAll, kPeersKnown };              // kAll: __syncthreads, at different places
constexpr std::uint32_t kNoWeight = 0xffffffff;  // in a weight's place: this entry is not part of the sum
__device__ __forceinline__ std::uint32_t weight_bits(float weight) {
  const std::uint32_t bits = __float_as_uint(weight);
  return bits == kNoWeight ? 0x7fffffff : bits;  // a NaN stays one
}

// A piece of a message: item `index` of the grid is (message, source, piece), sources in turn. Its rows of kAhead entries are loaded
// with it.
template <int kChunks, int kAhead>
struct Task {
  int rank, number, piece;
  bool exists;
  Message message;
  uint4 rows[kAhead][kChunks];
  __device__ __forceinline__ void locate(const CombineOp& a, unsigned index) {
    const unsigned in_turn = a.by_pieces.quotient(index), of = a.by_others.quotient(in_turn);
    piece = static_cast<int>(index - in_turn * a.shape.pieces);
    number = static_cast<int>(of);
    rank = a.op.rank + 1 + static_cast<int>(in_turn - of * (a.op.ranks - 1));
    if (rank >= a.op.ranks) rank -= a.op.ranks;
  }
  __device__ __forceinline__ void load(const CombineOp& a, int count_of_lane) {
    const int lane = threadIdx.x % 32;
    if (a.op.ranks == 1 || number >= a.route.max_tokens) return;
    message = load_message(a, rank, number, lane);
    const int count = rank < 32 ? __shfl_sync(~0u, count_of_lane, rank) : load_count(a, rank);
    exists = number < count && message.entries > 0;
    if (exists) load_rows(a, 0);
  }
  // Of entries first, first + 1, ... as far as there are. What lies behind a row's end is left as it is.
  __device__ __forceinline__ void load_rows(const CombineOp& a, int first) {
    const int channel = piece * a.shape.per * 256 + threadIdx.x % 32 * 8;
    const int there = (a.hidden - channel + 255) / 256, chunks = min(a.shape.chunks_of(piece), there);
    const auto address = reinterpret_cast<unsigned long long>(message.row);
#pragma unroll
    for (int e = 0; e < kAhead; ++e) {
      if (e > 0 && first + e >= message.entries) continue;
      const auto* row = reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, address, first + e));
      const auto* at = reinterpret_cast<const uint4*>(row + channel);
      const int end = row ? chunks : 0;
#pragma unroll
      for (int u = 0; u < kChunks; ++u)
        if (u < end) rows[e][u] = __ldcs(at + u * 32);
    }
  }
};

// The weight of each lane's entry: from dispatch, or from the owner, who sends those of all places of the token. False when they
// do not come.
__device__ __forceinline__ bool await_weights(const CombineOp& a, const Shared& s, int rank, const Message& m,
                                              std::uint32_t* weight) {
  const int lane = threadIdx.x % 32, cells = (a.route.topk + 2) / 3;
  if (a.row_weights) {
    const auto row = m.row ? (m.row - a.x) / a.x_stride : 0;
    *weight = m.row ? weight_bits(__ldg(a.row_weights + row)) : kNoWeight;
    return true;
  }
  Peer& peer = s.peers[rank];
  const std::uint8_t* at = peer.local + a.entries + (std::int64_t{m.token} * cells + lane) * 16;
  uint4 cell = make_uint4(0, 0, 0, 0);
  Patience patience;
  unsigned polls = 0;
#pragma unroll 1
  for (;;) {
    if (lane < cells) cell = load_cell(at);
    if (__all_sync(~0u, lane >= cells || cell.w == peer.tag_in)) break;
    if (!warp_patient(a.op, *s.block, rank, polls, patience)) {
      if (lane == 0) fail_peer(a.op, *s.block, peer, rank);
      return false;
    }
  }
  const unsigned from = static_cast<unsigned>(m.place) / 3, which = m.place - 3 * from;
  const std::uint32_t x = __shfl_sync(~0u, cell.x, from), y = __shfl_sync(~0u, cell.y, from),
                      z = __shfl_sync(~0u, cell.z, from);
  *weight = !m.row ? kNoWeight : which == 0 ? x : which == 1 ? y : z;
  return true;
}

// A piece of the weighed sum of a message's rows, in order of places.
template <int kLanes, int kChunks, int kAhead>
__device__ __forceinline__ void send_sum(const CombineOp& a, const Shared& s, Task<kChunks, kAhead>& item) {
  const int lane = threadIdx.x % 32, chunks = a.shape.chunks_of(item.piece), entries = item.message.entries;
  const Peer& peer = s.peers[item.rank];
  if (entries > 1 || !alone_unweighted(a)) {
    std::uint32_t weight;
    if (!await_weights(a, s, item.rank, item.message, &weight)) return;
    float sum[kChunks][8] = {};
#pragma unroll 1
    for (int first = 0;;) {
#pragma unroll
      for (int e = 0; e < kAhead; ++e) {
        if (e > 0 && first + e >= entries) continue;
        const std::uint32_t bits = __shfl_sync(~0u, weight, first + e);
        if (bits == kNoWeight) continue;
#pragma unroll
        for (int u = 0; u < kChunks; ++u)
          if (u < chunks) add_weighted(sum[u], __uint_as_float(bits), item.rows[e][u]);
      }
      first += kAhead;
      if (first >= entries) break;
      item.load_rows(a, first);
    }
#pragma unroll
    for (int u = 0; u < kChunks; ++u) item.rows[0][u] = rounded(sum[u]);
  }
  std::uint8_t* to = peer.remote + std::int64_t{item.number} * a.shape.row_bytes + item.piece * a.shape.piece_bytes;
  if (kLanes != 1) {
    static_assert(kChunks <= 4);
    uint4 displaced = make_uint4(0, 0, 0, 0);  // word q of chunk u lies at 4 q + u
    const int tags = lane % 4 * 8 + 7;
    displaced.x = __shfl_sync(~0u, item.rows[0][0].w, tags);
    if (kChunks > 1) displaced.y = __shfl_sync(~0u, item.rows[0][1 % kChunks].w, tags);
    if (kChunks > 2) displaced.z = __shfl_sync(~0u, item.rows[0][2 % kChunks].w, tags);
    if (kChunks > 3) displaced.w = __shfl_sync(~0u, item.rows[0][3 % kChunks].w, tags);
    if (lane % 8 == 7) displaced.w = peer.tag_out;
#pragma unroll
    for (int u = 0; u < kChunks; ++u)
      if (lane % 8 == 7) item.rows[0][u].w = peer.tag_out;
    to += lane * 16;
    __syncwarp();  // no line of lanes that diverged
#pragma unroll
    for (int u = 0; u < kChunks; ++u)
      if (u < chunks) store_line(to + u * kChunkBytes, item.rows[0][u]);
    if (lane < 8) store_line(to + a.shape.per * kChunkBytes, displaced);
    return;
  }
  PieceSender<kLanes> out(a.shape, to, peer.tag_out);
#pragma unroll
  for (int u = 0; u < kChunks; ++u)
    if (u < chunks) out.send(u, lane, item.rows[0][u]);
  out.finish(lane);
}

// The weights of an own token, as they go to every rank that holds rows of it.
struct Weights {
  uint4 cell;      // lane i: places 3 i to 3 i + 2
  int rank;        // of the lane's place
  unsigned ranks;  // the first place of each other rank
};
// None of a token from `end` on. One warp.
__device__ __forceinline__ Weights weights_of(const CombineOp& a, int token, int end) {
  const int lane = threadIdx.x % 32;
  RawEntry raw = {};
  if (token < end) raw = load_raw(a, token);
  Weights w;
  w.rank = rank_of(a, raw);
  const bool remote = token < end && w.rank >= 0 && w.rank != a.op.rank && raw.route.x >= 0;
  const std::uint32_t weight = w.rank >= 0 ? weight_bits(raw.weight) : kNoWeight;
  const int from = 3 * lane;
  w.cell = make_uint4(__shfl_sync(~0u, weight, from % 32), __shfl_sync(~0u, weight, (from + 1) % 32),
                      __shfl_sync(~0u, weight, (from + 2) % 32), 0);
  const unsigned same = __match_any_sync(~0u, remote ? w.rank : -1 - lane);
  w.ranks = __ballot_sync(~0u, remote && !(same & ((1u << lane) - 1)));
  return w;
}
__device__ __forceinline__ void send_weights(const CombineOp& a, const Shared& s, int token, const Weights& w) {
  const int lane = threadIdx.x % 32, cells = (a.route.topk + 2) / 3;
  const std::int64_t at = a.entries + (std::int64_t{token} * cells + lane) * 16;
#pragma unroll 1
  for (unsigned left = w.ranks; left; left &= left - 1) {
    const Peer& peer = s.peers[__shfl_sync(~0u, w.rank, __ffs(left) - 1)];
    if (peer.active && lane < cells)
      store_cell(peer.remote + at, make_uint4(w.cell.x, w.cell.y, w.cell.z, peer.tag_out));
  }
}

// Items behind the first round are numbered by a word that never goes back: the operation's number above, how many were taken below.
__device__ __forceinline__ void open_items(State& state, std::uint64_t number) {
  asm volatile("red.max.relaxed.gpu.global.u64 [%0],%1;" ::"l"(&state.taken), "l"(number << kTakenBits) : "memory");
}
// By lane 0 of a warp that takes one; nothing waits for the answer here. (A constant would be added up over the warp first, and a
// branch would copy the answer: both wait.)
__device__ __forceinline__ unsigned long long take_item(State& state, bool takes) {
  unsigned long long before;
  asm volatile(
      "{.reg .pred p; .reg .u32 n; .reg .u64 m; mov.u32 n,%%laneid; setp.eq.u32 p,n,0; setp.ne.and.u32 p,%2,0,p;"
      "cvt.u64.u32 m,n; add.u64 m,m,1; @p atom.add.relaxed.gpu.global.u64 %0,[%1],m;}"
      : "=l"(before)
      : "l"(&state.taken), "r"(static_cast<unsigned>(takes))
      : "memory");
  return before;
}
__device__ __forceinline__ unsigned items_before(unsigned long long taken, std::uint64_t number) {
  const unsigned long long before = taken - (number << kTakenBits), most = 1ull << kTakenBits;
  return static_cast<unsigned>(before < most ? before : most);
}
// The next unit of this block if it is below `end`; ~0: there is none now; ~1: others were quicker. One thread.
__device__ __forceinline__ unsigned take_unit(unsigned& taken, unsigned end) {
  const unsigned before = *static_cast<volatile unsigned*>(&taken), unit = blockIdx.x + before * gridDim.x;
  if (unit >= end) return ~0u;
  return atomicCAS(&taken, before, before + 1) == before ? unit : ~1u;
}

// One block adds everything up again without the ranks that failed.
template <int kLanes, bool kFew>
__device__ __noinline__ void repair(const CombineOp& a, Shared s) {
  constexpr int kChunks = unit_chunks(kLanes, kFew);
  const unsigned units = a.route.num_tokens * a.units.of_token;
#pragma unroll 1
  for (unsigned unit = threadIdx.x / 32; unit < units; unit += kSumsThreads / 32)
    sum_unit<kLanes, kFew>(a, s, Unit<kChunks>(a, unit));
}

}  // namespace
}  // namespace gpu

template <int kLanes, bool kFew>
__global__ void __launch_bounds__(gpu::kSumsThreads, 1) combine_sums(const __grid_constant__ gpu::CombineOp a) {
  using namespace gpu;
  constexpr int kThreads = kSumsThreads, kWarps = kThreads / 32;
  constexpr int kControl = kWarps - 1;  // the warp that begins the operation,
  constexpr int kWeights = kWarps - 2;  // and the one that sends weights: they have the fewest rows to send
  constexpr int kChunks = unit_chunks(kLanes, kFew);
  __shared__ Block block;
  __shared__ unsigned units_taken;  // of this block
  const Shared s{&block, reinterpret_cast<Peer*>(shared_memory), nullptr};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool sends = a.op.parts & kSends, receives = a.op.parts & kReceives;
  // Of this warp's item; behind the first round they go to whoever is free.
  unsigned index = blockIdx.x + warp * gridDim.x;
  Task<sums_piece(kFew), sums_ahead(kFew)> item{};
  item.locate(a, index);
  // worked out here, not where it is used
  asm volatile("" : "+r"(item.rank), "+r"(item.number), "+r"(item.piece));
  const unsigned units = receives ? a.route.num_tokens * a.units.of_token : 0;
  touch_parameters(a);
  unsigned items = 0;
  int count = 0;  // messages of rank `lane`
  if (warp == kControl) {
    if (lane == 0) units_taken = 0;
    begin_operation(a.op, *s.block, s.peers);
    if (lane == 0) open_items(*a.op.state, s.block->number);
    arrive_some(kPeersKnown, 64);
    if (sends) send_headers(a, *s.block, s.peers);
  } else {
    wait_for_predecessor();
  }
  if (warp == kWeights) {
    int token = blockIdx.x;
    const int end = sends && !a.row_weights ? a.route.num_tokens : 0;
    const Weights weights = weights_of(a, token, end);
    sync_some(kPeersKnown, 64);
    send_weights(a, s, token, weights);
    sync_some(kAll, kThreads);
#pragma unroll 1
    for (token += gridDim.x; token < end; token += gridDim.x) send_weights(a, s, token, weights_of(a, token, end));
  }
  if (warp == kControl) sync_some(kAll, kThreads);  // nobody waits for its rows
  if (sends) {
    count = load_count(a, lane);
    item.load(a, count);
    items = static_cast<unsigned>(most_messages(a, count)) * (a.op.ranks - 1) * a.shape.pieces;
  }
  if (warp < kWeights) sync_some(kAll, kThreads);
  if (warp == kControl && receives && blockIdx.x == 0) await_headers(a, *s.block, s.peers);
  // After a send one sum of a token whose messages were taken up a round before. What a sum waits for is held by warps that wait for
  // earlier messages only, so no circle can form.
  const unsigned in_round = kWarps * gridDim.x;
#pragma unroll 1
  for (;;) {
    const bool sending = index < items;
    const unsigned long long taken = take_item(*a.op.state, sending);
    if (sending && item.exists && s.peers[item.rank].active) send_sum<kLanes>(a, s, item);
    unsigned unit = ~0u;
    if (lane == 0) {
      const unsigned ready = index < in_round ? 0 : a.units.of_token * a.units.by_messages.quotient(index - in_round);
      unit = take_unit(units_taken, sending ? min(ready, units) : units);
    }
    unit = __shfl_sync(~0u, unit, 0);
    if (unit < units)
      sum_unit<kLanes, kFew>(a, s, Unit<kChunks>(a, unit));
    else if (unit == ~0u && !sending)
      break;
    Task<sums_piece(kFew), sums_ahead(kFew)> next{};  // nothing of the one before stays in registers
    if (sending) {
      index = in_round + __shfl_sync(~0u, items_before(taken, s.block->number), 0);
      if (index < items) {
        next.locate(a, index);
        next.load(a, count);
      }
    }
    item = next;
  }
  if (!receives) return finish_sending(a.op, *s.block);
  if (finish_operation(a.op, *s.block, s.peers)) repair<kLanes, kFew>(a, s);
}

namespace gpu {
const void* combine_sums_kernel(int lanes, bool few) {
  if (lanes == 1)
    return few ? reinterpret_cast<const void*>(combine_sums<1, true>)
               : reinterpret_cast<const void*>(combine_sums<1, false>);
  return few ? reinterpret_cast<const void*>(combine_sums<8, true>)
             : reinterpret_cast<const void*>(combine_sums<8, false>);
}
}  // namespace gpu
}  // namespace nixl::core::ep
