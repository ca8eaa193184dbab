// Combine with sums on the way: the rank that holds a token's rows weighs them, adds them up and sends the sum to the token's
// owner, which adds what comes. Which rows, and to whom, dispatch has recorded; so nobody asks and nobody counts. The owner sends
// the weights first, unless they came with dispatch; a row that is alone does not wait for them, the owner weighs it.
#include "ep/cuda/device/combine.cuh"

namespace nixl::core::ep {
namespace gpu {
namespace {

constexpr int kBatch = 4;  // sums whose loads are in flight together
// Chunks that a warp adds up at once.
constexpr int unit_chunks(int lanes, bool few) {
  return few || lanes == 1 ? 1 : 2;
}
enum Barrier { kAll, kPeersKnown };              // kAll: __syncthreads, at different places
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

// Whether a message of one row goes as it is: while weights travel the link has nothing else to do.
__device__ __forceinline__ bool alone_unweighted(const CombineOp& a) {
  return !a.row_weights;
}
// A piece of the weighed sum of a message's rows, in order of places.
template <int kLanes, int kChunks, int kAhead>
__device__ __forceinline__ void send_sum(const CombineOp& a, const Shared& s, Item<kChunks, kAhead>& item) {
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
          if (u < chunks) add_weighted(sum[u], __uint_as_float(bits), item.rows[e].chunk[u]);
      }
      first += kAhead;
      if (first >= entries) break;
      item.load_rows(a, first);
    }
#pragma unroll
    for (int u = 0; u < kChunks; ++u) item.rows[0].chunk[u] = rounded(sum[u]);
  }
  PieceSender<kLanes> out(
      a.shape, peer.remote + std::int64_t{item.number} * a.shape.row_bytes + item.piece * a.shape.piece_bytes,
      peer.tag_out);
#pragma unroll
  for (int u = 0; u < kChunks; ++u)
    if (u < chunks) out.send(u, lane, item.rows[0].chunk[u]);
  out.finish(lane);
}

// What the owner knows of an entry of a token; lane p of a warp loads that of place p.
struct RawEntry {
  int low, high, turn;
  int2 route;
  float weight;
};
__device__ __forceinline__ RawEntry load_raw(const CombineOp& a, int token) {
  const int lane = threadIdx.x % 32, place = lane < a.route.topk ? lane : 0;
  const std::int64_t entry = std::int64_t{token} * a.route.topk + place;
  const bool wide = a.route.index_bytes == 8;
  const int* words = static_cast<const int*>(a.route.topk_idx) + (wide ? 2 * entry : entry);
  RawEntry raw;
  raw.low = __ldg(words);
  raw.high = wide ? __ldg(words + 1) : 0;
  raw.turn = __ldg(a.records + a.record.turns + entry);
  raw.route = __ldg(reinterpret_cast<const int2*>(a.records + a.record.routes) + entry);
  raw.weight = __ldg(a.weights + entry);
  return raw;
}
__device__ __forceinline__ int rank_of(const CombineOp& a, const RawEntry& raw) {
  const bool inside = raw.high == 0 && raw.low >= 0 && raw.low < a.op.ranks * a.op.experts;
  return inside && threadIdx.x % 32 < a.route.topk ? rank_of_expert(a.op, raw.low) : -1;
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

// What a token's sum is made of: lane t of the warp holds the entry that is added at turn t, the sets say what it is.
struct Contributions {
  unsigned long long from;  // a rank's sum, in lines, or a plain row of our own
  float weight;
  std::uint32_t tag;
  int rank;
  unsigned own;    // entries of the own rank
  unsigned sums;   // for each rank that sends one: its first entry
  unsigned alone;  // those of one row that comes as it is
};
__device__ __forceinline__ Contributions contributions_of(const CombineOp& a, const Shared& s, const RawEntry& raw) {
  const int lane = threadIdx.x % 32;
  const int place = raw.turn & 31;
  const int rank = __shfl_sync(~0u, rank_of(a, raw), place), its_route = __shfl_sync(~0u, raw.route.x, place);
  const int route = lane < a.route.topk && rank >= 0 ? its_route : -1;
  const bool own = rank == a.op.rank;
  const Peer& peer = s.peers[rank < 0 ? a.op.rank : rank];
  const bool valid = route >= 0 && peer.active && (own || route < a.route.max_tokens);
  Contributions c;
  c.rank = rank;
  c.weight = __shfl_sync(~0u, raw.weight, place);
  c.tag = peer.tag_in;
  c.from = own ? reinterpret_cast<unsigned long long>(row_at(a, route))
               : reinterpret_cast<unsigned long long>(peer.local + std::int64_t{route} * a.shape.row_bytes);
  const unsigned same = __match_any_sync(~0u, valid ? rank : -1 - lane);
  c.own = __ballot_sync(~0u, valid && own && c.from != 0);
  c.sums = __ballot_sync(~0u, valid && !own && !(same & ((1u << lane) - 1)));
  c.alone = __ballot_sync(~0u, alone_unweighted(a) && same == 1u << lane) & c.sums;
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

// What a warp adds up at once: neighbouring chunks of one piece of a token.
template <int kChunks>
struct Unit {
  int token, piece, within, first;  // `within` the piece; first: of the row
  int count;                        // chunks that there are; may be 0 or less at the end of a row
  __device__ __forceinline__ Unit(const RowShape& shape, unsigned unit) {
    const unsigned of_piece = (shape.per + kChunks - 1u) / kChunks, of_token = of_piece * shape.pieces;
    token = static_cast<int>(unit / of_token);
    const unsigned in_token = unit - token * of_token;
    piece = static_cast<int>(in_token / of_piece);
    within = static_cast<int>(in_token - piece * of_piece) * kChunks;
    first = piece * shape.per + within;
    count = min(kChunks, shape.chunks_of(piece) - within);
  }
  static __device__ __forceinline__ unsigned of_token(const RowShape& shape) {
    return (shape.per + kChunks - 1u) / kChunks * shape.pieces;
  }
};

// The next unit of this block if it is of a token before `end`; ~0: there is none now; ~1: others were quicker. One thread.
template <int kChunks>
__device__ __forceinline__ unsigned take_unit(const RowShape& shape, unsigned& taken, unsigned units, unsigned end) {
  const unsigned before = *static_cast<volatile unsigned*>(&taken), unit = blockIdx.x + before * gridDim.x;
  if (unit >= units || Unit<kChunks>(shape, unit).token >= end) return ~0u;
  return atomicCAS(&taken, before, before + 1) == before ? unit : ~1u;
}

// The sums of the rows that are on the own rank.
template <int kChunks>
__device__ __forceinline__ void own_sums(const CombineOp& a, const Contributions& c, const Unit<kChunks>& unit,
                                         uint4 (&out)[kChunks]) {
  const int lane = threadIdx.x % 32;
  float sum[kChunks][8] = {};
#pragma unroll 1
  for (unsigned left = c.own; left;) {
    const int one = __ffs(left) - 1;
    left &= left - 1;
    const int other = left ? __ffs(left) - 1 : one;
    const auto* first = reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, c.from, one));
    const auto* second = reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, c.from, other));
    uint4 of_first[kChunks], of_second[kChunks];
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int chunk = unit.first + min(k, unit.count - 1);
      of_first[k] = load_row(a, first, chunk, lane);
      of_second[k] = load_row(a, second, chunk, lane);
    }
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      add_weighted(sum[k], __shfl_sync(~0u, c.weight, one), of_first[k]);
      if (left) add_weighted(sum[k], __shfl_sync(~0u, c.weight, other), of_second[k]);
    }
    left &= left - 1;
  }
#pragma unroll
  for (int k = 0; k < kChunks; ++k) out[k] = rounded(sum[k]);
}

// Neighbouring chunks of a piece on their way in. Of 8 lanes they share the line of what their tags displaced.
template <int kLanes, int kChunks>
struct ArrivingUnit {
  using Line = Lines<kLanes>;
  static constexpr int kTails = kLanes == 1 ? kChunks : 1;
  uint4 data[kChunks], tail[kTails];
  // piece: its first byte in the row
  __device__ __forceinline__ void load(const RowShape& shape, const std::uint8_t* piece, const Unit<kChunks>& unit,
                                       int lane) {
    const std::uint8_t* tails = piece + shape.per * kChunkBytes;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
      const int within = unit.within + min(k, unit.count - 1);
      data[k] = Line::load(piece + within * kChunkBytes, lane);
      if (kLanes == 1) tail[k % kTails] = load_cell(tails + (within * 11 + lane / 3) * 16);
    }
    if (kLanes != 1) tail[0] = load_line(tails + lane % 8 * 16);
  }
  __device__ __forceinline__ bool fresh(int lane, std::uint32_t tag) const {
    bool all = true;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) all = all && data[k].w == tag;
#pragma unroll
    for (int k = 0; k < kTails; ++k) all = all && tail[k].w == tag;
    return !Line::holds_tag(lane) || all;
  }
  __device__ __forceinline__ uint4 value(int k, const Unit<kChunks>& unit, int lane) const {
    const uint4 from = tail[k % kTails];
    const int q = kLanes == 1 ? lane % 3 : lane / 8;
    std::uint32_t word = q == 0 ? from.x : q == 1 ? from.y : q == 2 ? from.z : from.w;
    if (kLanes != 1) word = __shfl_sync(~0u, word, lane / 8 * 8 + unit.within + min(k, unit.count - 1));
    uint4 v = data[k];
    if (Line::holds_tag(lane)) v.w = word;
    return v;
  }
};

// Adds up one unit. One warp.
template <int kLanes, bool kFew, int kChunks>
__device__ __forceinline__ void sum_unit(const CombineOp& a, const Shared& s, const Unit<kChunks>& unit) {
  if (unit.count <= 0) return;
  const int lane = threadIdx.x % 32;
  const Contributions terms = contributions_of(a, s, load_raw(a, unit.token));
  const unsigned own = terms.own & -terms.own;
  uint4 of_own[kChunks];
  own_sums(a, terms, unit, of_own);
  const int piece_at = unit.piece * a.shape.piece_bytes;
  const auto wait = [&] {
    const int end =
        kLanes == 1 ? a.shape.per * kChunkBytes + a.shape.chunks_of(unit.piece) * 11 * 16 : a.shape.piece_bytes;
    await_pieces(a, s, terms, piece_at + end - 4);
  };
  bool waited = kFew;
  float total[kChunks][8] = {};
#pragma unroll 1
  for (unsigned left = terms.sums | own; left;) {  // by rank
    ArrivingUnit<kLanes, kChunks> in[kBatch];
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
      if (sent) {
        in[u].load(a.shape, from + piece_at, unit, lane);
      } else {
#pragma unroll
        for (int k = 0; k < kChunks; ++k) in[u].data[k] = of_own[k];
      }
    }
    const unsigned sent = missing;
    Patience patience;
    unsigned polls = 0;
#pragma unroll 1
    while (missing) {
      unsigned late = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!(missing >> u & 1)) continue;
        const std::uint32_t tag = __shfl_sync(~0u, terms.tag, turn[u]);
        if (!__all_sync(~0u, in[u].fresh(lane, tag))) late |= 1u << u;
      }
      missing = late;
      if (!missing) break;
      if (!waited) {
        wait();
        waited = true;
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (!(missing >> u & 1)) continue;
        const int rank = __shfl_sync(~0u, terms.rank, turn[u]);
        if (!warp_patient(a.op, *s.block, rank, polls, patience)) {
          if (lane == 0) fail_peer(a.op, *s.block, s.peers[rank], rank);
          missing &= ~(1u << u);
          here &= ~(1u << u);
          continue;
        }
        const auto* from = reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, terms.from, turn[u]));
        in[u].load(a.shape, from + piece_at, unit, lane);
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (!(here >> u & 1)) continue;
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        uint4 v = sent >> u & 1 ? in[u].value(k, unit, lane) : in[u].data[k];
        if (terms.alone >> turn[u] & 1) {
          float weighed[8] = {};
          add_weighted(weighed, __shfl_sync(~0u, terms.weight, turn[u]), v);
          v = rounded(weighed);
        }
        add_plain(total[k], v);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kChunks; ++k) {
    const int channel = (unit.first + k) * 256 + lane * 8;
    if (k < unit.count && channel < a.hidden)
      __stcs(reinterpret_cast<uint4*>(a.out + std::int64_t{unit.token} * a.hidden + channel), rounded(total[k]));
  }
}

// One block adds everything up again without the ranks that failed.
template <int kLanes, bool kFew>
__device__ __noinline__ void repair(const CombineOp& a, Shared s) {
  constexpr int kChunks = unit_chunks(kLanes, kFew);
  const unsigned units = a.route.num_tokens * Unit<kChunks>::of_token(a.shape);
#pragma unroll 1
  for (unsigned unit = threadIdx.x / 32; unit < units; unit += kSumsThreads / 32)
    sum_unit<kLanes, kFew>(a, s, Unit<kChunks>(a.shape, unit));
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
  __shared__ unsigned units_taken;  // of this block
  const Shared s = carve(a);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool sends = a.op.parts & kSends, receives = a.op.parts & kReceives;
  unsigned turn = warp;  // the block takes every gridDim.x-th item, a warp the next when it is done with one
  Item<sums_piece(kFew), sums_ahead(kFew)> item{};
  item.locate(a, blockIdx.x + turn * gridDim.x);
  // worked out here, not where it is used
  asm volatile("" : "+r"(item.rank), "+r"(item.number), "+r"(item.piece));
  touch_parameters(a);
  unsigned items = 0;
  if (warp == kControl) {
    if (lane == 0) units_taken = 0;
    begin_operation(a.op, *s.block, s.peers);
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
    const int count = load_count(a, lane);
    item.load(a, count);
    items = static_cast<unsigned>(most_messages(a, count)) * (a.op.ranks - 1) * a.shape.pieces;
  }
  if (warp < kWeights) sync_some(kAll, kThreads);
  if (warp == kControl && receives && blockIdx.x == 0) await_headers(a, *s.block, s.peers);
  // Sends in rounds; after a send one sum of a token whose messages were taken up, everywhere, at least one round before. What a
  // sum waits for is held by warps that wait for earlier messages only, so no circle can form.
  const unsigned in_round = kWarps * gridDim.x, per_token = max(1, (a.op.ranks - 1) * a.shape.pieces);
  const unsigned units = receives ? a.route.num_tokens * Unit<kChunks>::of_token(a.shape) : 0;
#pragma unroll 1
  for (;;) {
    const bool sending = blockIdx.x + turn * gridDim.x < items;
    if (sending && item.exists && s.peers[item.rank].active) send_sum<kLanes>(a, s, item);
    const unsigned past = sending ? turn / kWarps * in_round : ~0u;
    unsigned unit = ~0u;
    if (lane == 0 && past >= per_token) unit = take_unit<kChunks>(a.shape, units_taken, units, past / per_token);
    unit = __shfl_sync(~0u, unit, 0);
    if (unit < units)
      sum_unit<kLanes, kFew>(a, s, Unit<kChunks>(a.shape, unit));
    else if (unit == ~0u && !sending)
      break;
    Item<sums_piece(kFew), sums_ahead(kFew)> next{};  // nothing of the one before stays in registers
    if (sending) {
      if (lane == 0) turn = kWarps + atomicAdd(&s.block->cursor, 1);
      turn = __shfl_sync(~0u, turn, 0);
      if (const unsigned at = blockIdx.x + turn * gridDim.x; at < items) {
        next.locate(a, at);
        next.load(a, load_count(a, lane));
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
