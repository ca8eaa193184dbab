// Combine of rows as they are: the rank that holds a token's rows sends each to the token's owner, which weighs and adds them. One
// hop, nobody waits for weights: for few tokens, for few rows a token, and where sums must be exact or weights come late.
#include "ep/cuda/device/combine.cuh"

namespace nixl::core::ep {
namespace gpu {
namespace {

// Contributions whose loads are in flight together. For few tokens all at once: a trip to memory is what counts.
constexpr int rows_batch(bool few) {
  return few ? 8 : 2;
}
enum Barrier { kAll };         // __syncthreads, at different places
constexpr int kRowsAhead = 2;  // rows of a message that a warp loads before it sends the first

// Where a row that is not summed goes: in the sender's slot while rows of all entries fit there, else to an area that all
// senders share, by the parity of the owner's operation.
__device__ __forceinline__ std::uint8_t* row_in_slot(const CombineOp& a, std::uint8_t* slot, int message, int entry) {
  return slot + (std::int64_t{message} * a.route.topk + entry) * a.shape.row_bytes;
}
__device__ __forceinline__ std::uint8_t* row_by_place(const CombineOp& a, std::uint8_t* areas, std::uint32_t parity,
                                                      int token, int place) {
  return areas + a.op.layout.exact_of(parity) + (std::int64_t{token} * a.route.topk + place) * a.shape.row_bytes;
}

// The item's share of the entries' rows, as they are.
template <int kLanes, int kAhead>
__device__ __forceinline__ void send_rows(const CombineOp& a, const Peer& peer, Item<kRowsPiece, kAhead>& item) {
  const int lane = threadIdx.x % 32, chunks = a.shape.chunks_of(item.piece), split = static_cast<int>(a.split);
  const Message& m = item.message;
#pragma unroll 1
  for (int first = item.entry; first < m.entries; first += kAhead * split) {
    if (first != item.entry) item.load_rows(a, first);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int e = first + u * split;
      if (u > 0 && e >= m.entries) continue;
      std::uint8_t* to = a.rows == Rows::kInSlot
                             ? row_in_slot(a, peer.remote, item.number, e)
                             : row_by_place(a, peer.exact, peer.parity, m.token, __shfl_sync(~0u, m.place, e));
      PieceSender<kLanes> out(a.shape, to + item.piece * a.shape.piece_bytes, peer.tag_out);
#pragma unroll
      for (int c = 0; c < kRowsPiece; ++c)
        if (c < chunks) out.send(c, lane, item.rows[u].chunk[c]);
      out.finish(lane);
    }
  }
}

// What a token's sum is made of: lane t of the warp holds what is added at turn t, the sets say of which kind it is.
struct Contributions {
  unsigned long long from;  // a row of lines, or a plain row of our own
  float weight;
  std::uint32_t tag;
  int rank;
  unsigned all, lines, last;  // sets of turns; last: of its rank
};
__device__ __forceinline__ Contributions contributions_of(const CombineOp& a, const Shared& s, int token, int slot) {
  const int lane = threadIdx.x % 32, topk = a.route.topk;
  const int place = lane < topk ? s.own[slot * topk + lane].place : 0;
  const OwnEntry& entry = s.own[slot * topk + place];
  const int rank = lane < topk ? entry.rank : -1;
  const int route = rank >= 0 ? entry.route : -1, number = entry.number;
  const bool own = rank == a.op.rank;
  const Peer& peer = s.peers[rank < 0 ? a.op.rank : rank];
  const bool valid = route >= 0 && peer.active && (own || route < a.route.max_tokens);
  const unsigned same = __match_any_sync(~0u, valid ? rank : -1 - lane);
  Contributions c;
  c.rank = rank;
  c.weight = entry.weight;
  c.tag = peer.tag_in;
  const bool in_slot = a.rows == Rows::kInSlot;
  const std::int64_t row = in_slot ? std::int64_t{route} * topk + number : std::int64_t{token} * topk + place;
  const std::uint8_t* rows = in_slot ? peer.local : a.op.data + a.op.layout.exact_of(s.block->number & 1);
  c.from = own ? reinterpret_cast<unsigned long long>(row_at(a, route))
               : reinterpret_cast<unsigned long long>(rows + row * a.shape.row_bytes);
  c.all = __ballot_sync(~0u, valid && c.from != 0);
  c.lines = __ballot_sync(~0u, !own) & c.all;
  c.last = __ballot_sync(~0u, same >> lane == 1) & c.all;
  return c;
}

// Adds up chunks of one token, one warp: chunk = first, first + step, ...
template <int kLanes, int kBatch>
__device__ __forceinline__ void sum_token(const CombineOp& a, const Shared& s, int token, int slot, int first,
                                          int step) {
  const int lane = threadIdx.x % 32;
  if (first >= a.shape.chunks) return;
  const Contributions terms = contributions_of(a, s, token, slot);
#pragma unroll 1
  for (int chunk = first; chunk < a.shape.chunks; chunk += step) {
    const int piece = static_cast<unsigned>(chunk) / static_cast<unsigned>(a.shape.per),
              c = chunk - piece * a.shape.per;
    const int channel = chunk * 256 + lane * 8;
    // Inside a row of lines: the chunk, and what this lane reads of its tail. Own rows have no tail.
    const int line_at = piece * a.shape.piece_bytes + c * kChunkBytes;
    const int tail_at = piece * a.shape.piece_bytes + a.shape.per * kChunkBytes +
                        (kLanes == 1 ? (c * 11 + lane / 3) * 16 : lane % 8 * 16);
    const int own_at = channel < a.hidden ? 2 * channel : 0;
    float total[8] = {}, group[8] = {};
#pragma unroll 1
    for (unsigned left = terms.all; left;) {
      Arriving<kLanes> in[kBatch];
      int turn[kBatch];
      float weight[kBatch];
      unsigned here = 0, missing = 0, last = 0;  // sets of the batch
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!left) continue;
        const int t = __ffs(left) - 1;
        left &= left - 1;
        turn[u] = t;
        const auto* from = reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, terms.from, t));
        const bool lines = terms.lines >> t & 1;
        in[u].load(from, lines ? line_at : own_at - lane * 16, lines ? tail_at : own_at, lane);
        weight[u] = __shfl_sync(~0u, terms.weight, t);
        here |= 1u << u;
        missing |= (terms.lines >> t & 1) << u;
        last |= (terms.last >> t & 1) << u;
      }
      const unsigned lines = missing;
      Patience patience;
      unsigned polls = 0;
#pragma unroll 1
      while (missing) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (!(missing >> u & 1)) continue;
          if (__all_sync(~0u, in[u].fresh(lane, __shfl_sync(~0u, terms.tag, turn[u])))) {
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
          in[u].load(reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, terms.from, turn[u])), line_at, tail_at,
                     lane);
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!(here >> u & 1)) continue;
        add_weighted(group, weight[u], lines >> u & 1 ? in[u].value(c, lane) : in[u].data);
        if (!a.exact && (last >> u & 1)) {
          add_plain(total, rounded(group));
#pragma unroll
          for (float& value : group) value = 0;
        }
      }
    }
    if (channel < a.hidden)
      __stcs(reinterpret_cast<uint4*>(a.out + std::int64_t{token} * a.hidden + channel),
             a.exact ? rounded(group) : rounded(total));
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
    load_entries(a, {base, 1, 0, 1}, base + tokens, s.own, threadIdx.x, rows_threads(kFew));
    __syncthreads();
#pragma unroll 1
    for (int slot = 0; slot < tokens; ++slot)
      sum_token<kLanes, rows_batch(kFew)>(a, s, base + slot, slot, threadIdx.x / 32, rows_threads(kFew) / 32);
  }
}
// Begins the operation: headers, and where rows of each owner go. One warp.
__device__ __forceinline__ void begin(const CombineOp& a, const Shared& s) {
  const Op& op = a.op;
  begin_operation(op, *s.block, s.peers, a.rows == Rows::kByPlace);
  __syncwarp();
  if (!(op.parts & kSends)) return;
  send_headers(a, *s.block, s.peers);
  if (a.rows != Rows::kByPlace) return;
#pragma unroll 1
  for (int rank = threadIdx.x % 32; rank < op.ranks; rank += 32)
    if (s.peers[rank].active && rank != op.rank && s.peers[rank].parity == kUnknownParity)
      await_header(op, *s.block, s.peers[rank], rank, nullptr);
}

}  // namespace
}  // namespace gpu

template <int kLanes, bool kFew>
__global__ void __launch_bounds__(gpu::rows_threads(kFew), 1) combine_rows(const __grid_constant__ gpu::CombineOp a) {
  using namespace gpu;
  constexpr int kWarps = rows_threads(kFew) / 32;
  constexpr int kControl = kWarps - 1;  // the warp that begins the operation,
  constexpr int kEntries = kWarps - 2;  // and the one that loads the entries: they have the fewest rows to send
  const Shared s = carve(a);
  const Share share = share_of_tokens(a, kWarps);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool sends = a.op.parts & kSends, receives = a.op.parts & kReceives;
  unsigned next = blockIdx.x + warp * gridDim.x;
  Item<kRowsPiece, kRowsAhead> item;
  item.locate(a, next);
  // worked out here, not where it is used
  asm volatile("" : "+r"(item.rank), "+r"(item.number), "+r"(item.piece), "+r"(item.entry));
  touch_parameters(a);
  if (warp != kControl) wait_for_predecessor();
  unsigned items = 0;
  if (warp == kControl) begin(a, s);
  if (warp == kEntries) load_entries(a, share, a.route.num_tokens, s.own, lane, 32);
  if (warp == kControl) sync_some(kAll, rows_threads(kFew));  // nobody waits for its rows
  if (sends) {
    const int count = load_count(a, lane);
    item.load(a, count);
    items = static_cast<unsigned>(most_messages(a, count)) * (a.op.ranks - 1) * a.shape.pieces * a.split;
  }
  if (warp != kControl) sync_some(kAll, rows_threads(kFew));
  if (warp == kControl && receives && blockIdx.x == 0) await_headers(a, *s.block, s.peers);
  // Sends in rounds; after a round the sums of tokens whose messages were sent, everywhere, at least one round before.
  const unsigned in_round = kWarps * gridDim.x, per_token = (a.op.ranks - 1) * a.shape.pieces * a.split;
  const int first = share.part * kWarps + (kWarps - 1 - warp), step = share.parts * kWarps;
  int token = share.first, slot = 0;
#pragma unroll 1
  for (unsigned past = 0;; past += in_round) {
    const bool all_sent = next >= items;
    if (!all_sent && item.exists && s.peers[item.rank].active) send_rows<kLanes>(a, s.peers[item.rank], item);
    if (receives)
#pragma unroll 1
      for (; token < a.route.num_tokens && (all_sent || (token + 1) * per_token <= past); token += share.step, ++slot)
        sum_token<kLanes, rows_batch(kFew)>(a, s, token, slot, first, step);
    if (all_sent) break;
    next += in_round;
    if (next < items) {
      item.locate(a, next);
      item.load(a, load_count(a, lane));
    }
  }
  if (!receives) return finish_sending(a.op, *s.block);
  if (finish_operation(a.op, *s.block, s.peers)) repair<kLanes, kFew>(a, s);
}

namespace gpu {
const void* combine_rows_kernel(int lanes, bool few) {
  if (lanes == 1)
    return few ? reinterpret_cast<const void*>(combine_rows<1, true>)
               : reinterpret_cast<const void*>(combine_rows<1, false>);
  return few ? reinterpret_cast<const void*>(combine_rows<8, true>)
             : reinterpret_cast<const void*>(combine_rows<8, false>);
}
}  // namespace gpu
}  // namespace nixl::core::ep
