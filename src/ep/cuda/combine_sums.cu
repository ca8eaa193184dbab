// Combine with sums on the way: the rank that holds a token's rows weighs them, adds them up and sends the sum to the token's
// owner, which adds what comes. Which rows, and to whom, dispatch has recorded; so nobody asks and nobody counts. The owner sends
// the weights first, unless they came with dispatch.
#include "ep/cuda/device/combine.cuh"

namespace nixl::core::ep {
namespace gpu {
namespace {

constexpr int kBatch = 4;  // sums whose loads are in flight together
// Chunks that a warp adds up at once when it has nothing to send any more.
constexpr int sums_at_once(bool few) {
  return few ? 1 : 2;
}
enum Barrier { kAll, kEntriesKnown };            // kAll: __syncthreads
constexpr std::uint32_t kNoWeight = 0xffffffff;  // in a weight's place: this entry is not part of the sum
__device__ __forceinline__ std::uint32_t weight_bits(float weight) {
  const std::uint32_t bits = __float_as_uint(weight);
  return bits == kNoWeight ? 0x7fffffff : bits;  // a NaN stays one
}

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
__device__ __forceinline__ void send_sum(const CombineOp& a, const Shared& s, Item<kChunks, kAhead>& item) {
  const int lane = threadIdx.x % 32, chunks = a.shape.chunks_of(item.piece), entries = item.message.entries;
  std::uint32_t weight;
  if (!await_weights(a, s, item.rank, item.message, &weight)) return;
  const Peer& peer = s.peers[item.rank];
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
        if (u < chunks) add_weighted(sum[u], __uint_as_float(bits), item.rows[e].chunk[u]);
    }
    first += kAhead;
    if (first >= entries) break;
    item.load_rows(a, first);
  }
  PieceSender<kLanes> out(
      a.shape, peer.remote + std::int64_t{item.number} * a.shape.row_bytes + item.piece * a.shape.piece_bytes,
      peer.tag_out);
#pragma unroll
  for (int u = 0; u < kChunks; ++u)
    if (u < chunks) out.send(u, lane, rounded(sum[u]));
  out.finish(lane);
}

// The weights of this block's tokens to the ranks that hold their rows. One warp.
__device__ void send_weights(const CombineOp& a, const Shared& s, Share share) {
  const int lane = threadIdx.x % 32, topk = a.route.topk, cells = (topk + 2) / 3;
#pragma unroll 1
  for (int token = share.first, slot = 0; token < a.route.num_tokens; token += share.step, ++slot) {
    const OwnEntry& own = s.own[slot * topk + (lane < topk ? lane : 0)];
    const int rank = lane < topk ? own.rank : -1;
    const bool remote = rank >= 0 && rank != a.op.rank && own.route >= 0 && s.peers[rank].active;
    const std::uint32_t weight = rank >= 0 ? weight_bits(own.weight) : kNoWeight;
    const int from = 3 * lane;
    const uint4 cell = make_uint4(__shfl_sync(~0u, weight, from % 32), __shfl_sync(~0u, weight, (from + 1) % 32),
                                  __shfl_sync(~0u, weight, (from + 2) % 32), 0);
    const unsigned same = __match_any_sync(~0u, remote ? rank : -1 - lane);
    unsigned left = __ballot_sync(~0u, remote && !(same & ((1u << lane) - 1)));
#pragma unroll 1
    for (; left; left &= left - 1) {
      const Peer& peer = s.peers[__shfl_sync(~0u, rank, __ffs(left) - 1)];
      if (lane < cells)
        store_cell(peer.remote + a.entries + (std::int64_t{token} * cells + lane) * 16,
                   make_uint4(cell.x, cell.y, cell.z, peer.tag_out));
    }
  }
}

// What a token's sum is made of: lane t of the warp holds the entry that is added at turn t, the sets say what it is.
struct Contributions {
  unsigned long long from;  // a rank's sum, in lines, or a plain row of our own
  float weight;
  std::uint32_t tag;
  int rank;
  unsigned own;   // entries of the own rank
  unsigned sums;  // for each rank that sends one: its first entry
};
__device__ __forceinline__ Contributions contributions_of(const CombineOp& a, const Shared& s, int token, int slot) {
  const int lane = threadIdx.x % 32, topk = a.route.topk;
  const int place = lane < topk ? s.own[slot * topk + lane].place : 0;
  const OwnEntry& entry = s.own[slot * topk + place];
  const int rank = lane < topk ? entry.rank : -1;
  const int route = rank >= 0 ? entry.route : -1;
  const bool own = rank == a.op.rank;
  const Peer& peer = s.peers[rank < 0 ? a.op.rank : rank];
  const bool valid = route >= 0 && peer.active && (own || route < a.route.max_tokens);
  Contributions c;
  c.rank = rank;
  c.weight = entry.weight;
  c.tag = peer.tag_in;
  c.from = own ? reinterpret_cast<unsigned long long>(row_at(a, route))
               : reinterpret_cast<unsigned long long>(peer.local + std::int64_t{route} * a.shape.row_bytes);
  const unsigned same = __match_any_sync(~0u, valid ? rank : -1 - lane);
  c.own = __ballot_sync(~0u, valid && own && c.from != 0);
  c.sums = __ballot_sync(~0u, valid && !own && !(same & ((1u << lane) - 1)));
  return c;
}

// Waits for the last line of a piece of every contribution. Whoever waits long looks at one word of each and at nothing else:
// hundreds of warps that read whole chunks again and again would take the memory's time from what arrives. One warp.
__device__ __forceinline__ void await_pieces(const CombineOp& a, const Shared& s, const Contributions& c,
                                             int last_tag) {
  bool here = !(c.sums >> (threadIdx.x % 32) & 1);
  const auto* at = reinterpret_cast<const std::uint8_t*>(c.from) + last_tag;
  Patience patience;
  unsigned polls = 0;
#pragma unroll 1
  for (;;) {
    if (!here) here = load_word(at) == c.tag;
    const unsigned without = __ballot_sync(~0u, !here);
    if (!without) return;
    const int rank = __shfl_sync(~0u, c.rank, __ffs(without) - 1);
    if (!warp_patient(a.op, *s.block, rank, polls, patience)) {
      if (threadIdx.x % 32 == 0) fail_peer(a.op, *s.block, s.peers[rank], rank);
      return;  // the sum gives it up at its first look
    }
    __nanosleep(20);
  }
}

// A chunk of the sum of the rows that are on the own rank.
__device__ __forceinline__ uint4 own_sum(const CombineOp& a, const Contributions& c, int chunk) {
  float sum[8] = {};
#pragma unroll 1
  for (unsigned left = c.own; left;) {
    const int one = __ffs(left) - 1;
    left &= left - 1;
    const int other = left ? __ffs(left) - 1 : one;
    const auto* first = reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, c.from, one));
    const auto* second = reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, c.from, other));
    const uint4 a_row = load_row(a, first, chunk, threadIdx.x % 32),
                b_row = load_row(a, second, chunk, threadIdx.x % 32);
    add_weighted(sum, __shfl_sync(~0u, c.weight, one), a_row);
    if (left) add_weighted(sum, __shfl_sync(~0u, c.weight, other), b_row);
    left &= left - 1;
  }
  return rounded(sum);
}

// Adds up chunks of one token, one warp: chunk = first, first + step, ..., kAtOnce of them at once.
template <int kLanes, bool kEager, int kAtOnce>
__device__ __forceinline__ void sum_token(const CombineOp& a, const Shared& s, int token, int slot, int first,
                                          int step) {
  const int lane = threadIdx.x % 32;
  if (first >= a.shape.chunks) return;
  const Contributions terms = contributions_of(a, s, token, slot);
  const unsigned own = terms.own & -terms.own;
#pragma unroll 1
  for (int chunk = first; chunk < a.shape.chunks; chunk += kAtOnce * step) {
    int within[kAtOnce], data_at[kAtOnce], tail_at[kAtOnce];  // a piece
    uint4 of_own[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = min(chunk + k * step, a.shape.chunks - 1);
      const int piece = static_cast<unsigned>(at) / static_cast<unsigned>(a.shape.per);
      const int piece_at = piece * a.shape.piece_bytes, tails_at = piece_at + a.shape.per * kChunkBytes;
      within[k] = at - piece * a.shape.per;
      data_at[k] = piece_at + within[k] * kChunkBytes;
      tail_at[k] = tails_at + Arriving<kLanes>::tail_at(within[k], lane);
      of_own[k] = own_sum(a, terms, at);
      if (kEager || k > 0 || chunk != first) continue;
      const int end = kLanes == 1 ? tails_at + a.shape.chunks_of(piece) * 11 * 16 : piece_at + a.shape.piece_bytes;
      await_pieces(a, s, terms, end - 4);
    }
    float total[kAtOnce][8] = {};
#pragma unroll 1
    for (unsigned left = terms.sums | own; left;) {  // by rank
      Arriving<kLanes> in[kBatch][kAtOnce];
      int turn[kBatch];
      unsigned here = 0, missing = 0;  // sets of the batch
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!left) continue;
        const int t = __ffs(left) - 1;
        const bool sent = !(left & -left & own);
        left &= left - 1;
        turn[u] = t;
        here |= 1u << u;
        missing |= (sent ? 1u : 0u) << u;
        const auto* from = reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, terms.from, t));
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (sent)
            in[u][k].load(from, data_at[k], tail_at[k], lane);
          else
            in[u][k].data = of_own[k];
      }
      const unsigned sent = missing;
      Patience patience;
      unsigned polls = 0;
#pragma unroll 1
      while (missing) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (!(missing >> u & 1)) continue;
          const std::uint32_t tag = __shfl_sync(~0u, terms.tag, turn[u]);
          bool fresh = true;
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) fresh = fresh && in[u][k].fresh(lane, tag);
          if (__all_sync(~0u, fresh)) {
            missing &= ~(1u << u);
            continue;
          }
          const int rank = __shfl_sync(~0u, terms.rank, turn[u]);
          if (!warp_patient(a.op, *s.block, rank, polls, patience)) {
            if (lane == 0) fail_peer(a.op, *s.block, s.peers[rank], rank);
            missing &= ~(1u << u);
            here &= ~(1u << u);
            continue;
          }
          const auto* from = reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, terms.from, turn[u]));
#pragma unroll
          for (int k = 0; k < kAtOnce; ++k) in[u][k].load(from, data_at[k], tail_at[k], lane);
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!(here >> u & 1)) continue;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          add_plain(total[k], sent >> u & 1 ? in[u][k].value(within[k], lane) : in[u][k].data);
      }
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int at = chunk + k * step, channel = at * 256 + lane * 8;
      if (at < a.shape.chunks && channel < a.hidden)
        __stcs(reinterpret_cast<uint4*>(a.out + std::int64_t{token} * a.hidden + channel), rounded(total[k]));
    }
  }
}

// One block adds everything up again without the ranks that failed.
template <int kLanes, bool kFew>
__device__ __noinline__ void repair(const CombineOp& a, Shared s) {
  const int span = (a.route.num_tokens + gridDim.x - 1) / gridDim.x;
#pragma unroll 1
  for (int base = 0; base < a.route.num_tokens; base += span) {
    const int tokens = min(span, a.route.num_tokens - base);
    __syncthreads();
    load_entries(a, {base, 1, 0, 1}, base + tokens, s.own, threadIdx.x, kSumsThreads);
    __syncthreads();
#pragma unroll 1
    for (int slot = 0; slot < tokens; ++slot)
      sum_token<kLanes, kFew, 1>(a, s, base + slot, slot, threadIdx.x / 32, kSumsThreads / 32);
  }
}

}  // namespace
}  // namespace gpu

template <int kLanes, bool kFew>
__global__ void __launch_bounds__(gpu::kSumsThreads, 1) combine_sums(const __grid_constant__ gpu::CombineOp a) {
  using namespace gpu;
  constexpr int kThreads = kSumsThreads, kWarps = kThreads / 32;
  constexpr int kControl = kWarps - 1;  // the warp that begins the operation; it has the fewest rows to send
  const Shared s = carve(a);
  const Share share = share_of_tokens(a, kWarps, blockIdx.x, gridDim.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool sends = a.op.parts & kSends, receives = a.op.parts & kReceives;
  unsigned turn = warp;  // the block takes every gridDim.x-th item, a warp the next when it is done with one
  Item<sums_piece(kFew), sums_ahead(kFew)> item;
  item.locate(a, blockIdx.x + turn * gridDim.x);
  // worked out here, not where it is used
  asm volatile("" : "+r"(item.rank), "+r"(item.number), "+r"(item.piece));
  touch_parameters(a);
  if (warp != kControl) wait_for_predecessor();
  unsigned items = 0;
  if (warp == kControl) {
    begin_operation(a.op, *s.block, s.peers);
    sync_some(kEntriesKnown, kThreads);
    if (sends) {
      if (!a.row_weights && share.part == 0) send_weights(a, s, share);
      send_headers(a, *s.block, s.peers);
    }
  } else {
    load_entries(a, share, a.route.num_tokens, s.own, threadIdx.x, kThreads - 32);
    arrive_some(kEntriesKnown, kThreads);
  }
  if (warp == kControl) sync_some(kAll, kThreads);  // nobody waits for its rows
  if (sends) {
    const int count = load_count(a, lane);
    item.load(a, count);
    items = static_cast<unsigned>(most_messages(a, count)) * (a.op.ranks - 1) * a.shape.pieces;
  }
  if (warp != kControl) sync_some(kAll, kThreads);
  if (warp == kControl && receives && blockIdx.x == 0) await_headers(a, *s.block, s.peers);
  // Sends in rounds; after a round the sums of tokens whose messages were taken up, everywhere, at least one round before. What a
  // sum waits for is held by warps that wait for earlier messages only, so no circle can form.
  const unsigned in_round = kWarps * gridDim.x, per_token = (a.op.ranks - 1) * a.shape.pieces;
  const int first = share.part * kWarps + (kWarps - 1 - warp), step = share.parts * kWarps;
  int token = share.first, slot = 0;
#pragma unroll 1
  while (blockIdx.x + turn * gridDim.x < items) {
    if (item.exists && s.peers[item.rank].active) send_sum<kLanes>(a, s, item);
    const unsigned past = turn / kWarps * in_round;
    if (receives)
#pragma unroll 1
      for (; token < a.route.num_tokens && (token + 1) * per_token <= past; token += share.step, ++slot)
        sum_token<kLanes, kFew, 1>(a, s, token, slot, first, step);
    if (lane == 0) turn = kWarps + atomicAdd(&s.block->cursor, 1);
    turn = __shfl_sync(~0u, turn, 0);
    const unsigned next = blockIdx.x + turn * gridDim.x;
    if (next < items) {
      item.locate(a, next);
      item.load(a, load_count(a, lane));
    }
  }
  if (receives)
#pragma unroll 1
    for (; token < a.route.num_tokens; token += share.step, ++slot)
      sum_token<kLanes, kFew, sums_at_once(kFew)>(a, s, token, slot, first, step);
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
