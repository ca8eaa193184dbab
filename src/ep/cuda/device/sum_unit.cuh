// The receiving half of a combine of sums: what a token's sum is made of, and its chunks as they come.
#pragma once
#include "ep/cuda/device/combine.cuh"

namespace nixl::core::ep::gpu {

constexpr int kBatch = 4;  // sums whose loads are in flight together

// Whether a message of one row goes as it is: while weights travel the link has nothing else to do.
__device__ __forceinline__ bool alone_unweighted(const CombineOp& a) {
  return !a.row_weights;
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
  // Entries of a rank are next to each other.
  const int before = __shfl_up_sync(~0u, rank, 1), behind = __shfl_down_sync(~0u, route >= 0 ? rank : -1, 1);
  c.own = __ballot_sync(~0u, valid && own && c.from != 0);
  c.sums = __ballot_sync(~0u, valid && !own && (lane == 0 || before != rank));
  c.alone = __ballot_sync(~0u, alone_unweighted(a) && behind != rank) & c.sums;
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
  __device__ __forceinline__ Unit(const CombineOp& a, unsigned unit) {
    const RowShape& shape = a.shape;
    const unsigned of = a.units.by_token.quotient(unit), in_token = unit - of * a.units.of_token,
                   of_token = a.units.by_piece.quotient(in_token);
    token = static_cast<int>(of);
    piece = static_cast<int>(of_token);
    within = static_cast<int>(in_token - of_token * a.units.of_piece) * kChunks;
    first = piece * shape.per + within;
    count = min(kChunks, shape.chunks_of(piece) - within);
  }
};
// A strong load stays where it stands: others are moved behind what waits for the loads before.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
// The sums of the rows that are on the own rank.
template <int kChunks>
__device__ __forceinline__ void own_sums(const CombineOp& a, const Contributions& c, const Unit<kChunks>& unit,
                                         uint4 (&out)[kChunks]) {
  const int lane = threadIdx.x % 32;
  float sum[kChunks][8] = {};
  int at[kChunks];  // what lies behind the row's end is not stored
#pragma unroll
  for (int k = 0; k < kChunks; ++k) at[k] = min((unit.first + k) * 256 + lane * 8, a.hidden - 8);
#pragma unroll 1
  for (unsigned left = c.own; left;) {
    const int one = __ffs(left) - 1;
    left &= left - 1;
    const int other = left ? __ffs(left) - 1 : one;
    const auto* first = reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, c.from, one));
    const auto* second = reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, c.from, other));
    uint4 of_first[kChunks], of_second[kChunks];
#pragma unroll
    for (int k = 0; k < kChunks; ++k) of_first[k] = load_once(first + at[k]);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) of_second[k] = load_once(second + at[k]);
    const float weight = __shfl_sync(~0u, c.weight, one), next = __shfl_sync(~0u, c.weight, other);
#pragma unroll
    for (int k = 0; k < kChunks; ++k) add_weighted(sum[k], weight, of_first[k]);
    if (!left) break;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) add_weighted(sum[k], next, of_second[k]);
    left &= left - 1;
  }
#pragma unroll
  for (int k = 0; k < kChunks; ++k) out[k] = rounded(sum[k]);
}

// Neighbouring chunks of a piece on their way in, and the words that their tags displaced: with 128-byte lines a lane has that of the
// piece's tail at its place, else those of its own chunks.
template <int kLanes, int kChunks>
struct ArrivingUnit {
  using Line = Lines<kLanes>;
  static constexpr int kWords = kLanes == 1 ? kChunks : 1;
  uint4 data[kChunks];
  std::uint32_t word[kWords];
  std::uint32_t tags;  // with 16-byte lines: what differs in those of the tail
  // first: of the unit's chunks, `step` to the next; tail: of the first. All lanes together.
  __device__ __forceinline__ void load(const std::uint8_t* first, int step, const std::uint8_t* tail, int lane,
                                       std::uint32_t tag) {
    __syncwarp();
    if (kLanes != 1) {
      data[0] = load_line(first + lane * 16);
      if (kChunks > 1) data[kChunks - 1] = load_line(first + step + lane * 16);
      word[0] = load_word(tail + lane * 4);
      return;
    }
    static_assert(kLanes != 1 || kChunks == 1);
    data[0] = load_cell(first + lane * 16);
    const uint4 cell = load_cell(tail + lane / 3 * 16);
    word[0] = lane % 3 == 0 ? cell.x : lane % 3 == 1 ? cell.y : cell.z;
    tags = cell.w ^ tag;
  }
  __device__ __forceinline__ bool fresh(int lane, std::uint32_t tag) const {
    std::uint32_t wrong = 0;
#pragma unroll
    for (int k = 0; k < kChunks; ++k) wrong |= data[k].w ^ tag;
    if (!Line::holds_tag(lane)) wrong = 0;
    if (kLanes == 1) return (wrong | tags) == 0;
    return (lane == 31 ? wrong | (word[0] ^ tag) : wrong) == 0;
  }
  __device__ __forceinline__ uint4 value(int k, int within, int lane, bool lines) const {
    const std::uint32_t displaced =
        kLanes == 1 ? word[k % kWords] : __shfl_sync(~0u, word[0], lane / 8 * 4 + within + k);
    uint4 v = data[k];
    if (lines && Line::holds_tag(lane)) v.w = displaced;
    return v;
  }
};

__device__ __forceinline__ uint4 weighed(uint4 v, float weight) {
  float sum[8] = {};
  add_weighted(sum, weight, v);
  return rounded(sum);
}

// Who does not come in time is given up. True: it did not.
static __device__ __noinline__ bool give_up(const CombineOp& a, const Shared& s, int rank, Patience& patience) {
  if (__all_sync(~0u, keep_waiting(a.op, *s.block, rank, patience))) return false;
  if (threadIdx.x % 32 == 0) fail_peer(a.op, *s.block, s.peers[rank], rank);
  return true;
}

// Adds up one unit. One warp.
template <int kLanes, bool kFew, int kChunks>
__device__ __forceinline__ void sum_unit(const CombineOp& a, const Shared& s, const Unit<kChunks>& unit) {
  if (unit.count <= 0) return;
  const int lane = threadIdx.x % 32;
  const Contributions terms = contributions_of(a, s, load_raw(a, unit.token));
  const unsigned own = terms.own & -terms.own;
  uint4 of_own[kChunks];
  own_sums(a, terms, unit, of_own);
  // Inside a row: the unit's chunks, their tail, and the end of what is sent of their piece.
  const int piece_at = unit.piece * a.shape.piece_bytes, tails_at = piece_at + a.shape.per * kChunkBytes;
  const int first_at = piece_at + unit.within * kChunkBytes,
            tail_at = tails_at + (kLanes == 1 ? unit.within * 11 * 16 : 0);
  const int step = unit.count > 1 ? kChunkBytes : 0;  // to the second chunk; the first stands for one that there is not
  bool waited = kFew;
  float total[kChunks][8] = {};
#pragma unroll 1
  for (unsigned left = terms.sums | own; left;) {  // by rank
    ArrivingUnit<kLanes, kChunks> in[kBatch];
    unsigned here = 0, missing = 0;  // sets of the batch
    int turn[kBatch];
    const std::uint8_t* from[kBatch];
    std::uint32_t tag[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const bool there = left != 0;
      turn[u] = there ? __ffs(left) - 1 : 0;
      const bool sent = there && !(left & -left & own);
      left &= left - 1;
      here |= (there ? 1u : 0u) << u;
      missing |= (sent ? 1u : 0u) << u;
      from[u] = reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, terms.from, turn[u]));
      tag[u] = __shfl_sync(~0u, terms.tag, turn[u]);
      if (sent) continue;
#pragma unroll
      for (int k = 0; k < kChunks; ++k) in[u].data[k] = of_own[k];
    }
    const unsigned sent = missing;
    Patience patience;
    unsigned polls = 0;
#pragma unroll 1
    for (;;) {
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if (missing >> u & 1) in[u].load(from[u] + first_at, step, from[u] + tail_at, lane, tag[u]);
#pragma unroll
      for (int u = 0; u < kBatch; ++u)
        if ((missing >> u & 1) && __all_sync(~0u, in[u].fresh(lane, tag[u]))) missing &= ~(1u << u);
      if (!missing) break;
      if (!waited) {
        const int end =
            kLanes == 1 ? tails_at + a.shape.chunks_of(unit.piece) * 11 * 16 : piece_at + a.shape.piece_bytes;
        await_pieces(a, s, terms, end - 4);
        waited = true;
      } else if (++polls % 64 == 0 || a.op.timeout_ns == 0) {
        const int late = __ffs(missing) - 1;
        int t = turn[0];
#pragma unroll
        for (int u = 1; u < kBatch; ++u) t = late == u ? turn[u] : t;
        if (give_up(a, s, __shfl_sync(~0u, terms.rank, t), patience)) {
          missing &= missing - 1;
          here &= ~(1u << late);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      if (!(here >> u & 1)) continue;
      const bool alone = terms.alone >> turn[u] & 1;
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        uint4 v = in[u].value(k, unit.within, lane, sent >> u & 1);
        if (alone) v = weighed(v, __shfl_sync(~0u, terms.weight, turn[u]));
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

}  // namespace nixl::core::ep::gpu
