// Combine. The rank that holds a token's rows sends them, or their weighed sum, to the token's owner, which adds what comes.
//
// Dispatch left records: what each message's rows are and what each own token waits for. So rows go out without being asked
// for, and nobody counts. Sums of one rank need the weights: the owner sends those first, unless they came with dispatch.
#include "ep/cuda/device/op.cuh"
#include "ep/cuda/device/piece.cuh"
#include "ep/cuda/launch.h"
#include "ep/layout/reduce.h"

namespace nixl::core::ep {
namespace gpu {
namespace {

constexpr int kControl = kWarps - 1;             // the warp that begins the operation; it has the fewest rows to send
constexpr int kBatch = 4;                        // contributions whose loads are in flight together
constexpr std::uint32_t kNoWeight = 0xffffffff;  // in a weight's place: this entry is not part of the sum
__device__ __forceinline__ std::uint32_t weight_bits(float weight) {
  const std::uint32_t bits = __float_as_uint(weight);
  return bits == kNoWeight ? 0x7fffffff : bits;  // a NaN stays one
}

struct Shared {
  Block* block;
  Peer* peers;
  int* rank;   // [own tokens][topk] rank of the entry; -1: none
  int* route;  //                    its message, or its row here; -1: nothing comes
  float* weight;
  int* turns;  // of this warp: the lane whose contribution is added at this turn
};

__device__ Shared carve(const CombineOp& a, std::uint8_t* memory) {
  __shared__ Block block;
  const CombineShared at = make_combine_shared(a, gridDim.x);
  Shared s;
  s.block = &block;
  s.peers = reinterpret_cast<Peer*>(memory + at.peers);
  s.rank = reinterpret_cast<int*>(memory + at.rank);
  s.route = reinterpret_cast<int*>(memory + at.route);
  s.weight = reinterpret_cast<float*>(memory + at.weight);
  s.turns = reinterpret_cast<int*>(memory + at.turns) + threadIdx.x / 32 * 32;
  return s;
}

// The own tokens of this block: first, first + step, ... Where there are at least twice as many blocks as tokens, `parts` blocks
// share a token. Tokens are spread over blocks, so that what arrives first gives every block something to add up.
struct Share {
  int first, step, part, parts;
};
__device__ __forceinline__ Share share_of_tokens(const CombineOp& a) {
  const unsigned grid = gridDim.x, block = blockIdx.x, n = a.route.num_tokens;
  const unsigned wanted = (a.shape.chunks + kWarps - 1) / kWarps;
  if (n == 0 || 2 * n > grid) return {static_cast<int>(block), static_cast<int>(grid), 0, 1};
  const unsigned most = grid / n, parts = most < wanted ? most : wanted;
  const unsigned part = block / n;
  return {static_cast<int>(part < parts ? block - part * n : n), static_cast<int>(n), static_cast<int>(part),
          static_cast<int>(parts)};
}

__device__ __forceinline__ uint4 load_row(const CombineOp& a, const std::uint16_t* row, int chunk, int lane) {
  const int channel = chunk * 256 + lane * 8;
  return channel < a.hidden ? __ldcs(reinterpret_cast<const uint4*>(row + channel)) : make_uint4(0, 0, 0, 0);
}
__device__ __forceinline__ const std::uint16_t* row_at(const CombineOp& a, int row) {
  const bool inside = row >= 0 && row < a.op.experts * a.op.ranks * a.route.max_tokens;
  return inside ? a.x + row * a.x_stride : nullptr;
}

__device__ __forceinline__ float low_value(std::uint32_t pair) {
  return float_from_bits(pair << 16);
}
__device__ __forceinline__ float high_value(std::uint32_t pair) {
  return float_from_bits(pair & 0xffff0000);
}
__device__ __forceinline__ void add_weighted(float (&sum)[8], float weight, uint4 v) {
  const std::uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = add_rn(sum[2 * i], mul_rn(weight, low_value(w[i])));
    sum[2 * i + 1] = add_rn(sum[2 * i + 1], mul_rn(weight, high_value(w[i])));
  }
}
__device__ __forceinline__ void add_plain(float (&sum)[8], uint4 v) {
  const std::uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum[2 * i] = add_rn(sum[2 * i], low_value(w[i]));
    sum[2 * i + 1] = add_rn(sum[2 * i + 1], high_value(w[i]));
  }
}
__device__ __forceinline__ std::uint32_t pack(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ uint4 rounded(const float (&sum)[8]) {
  return make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]), pack(sum[6], sum[7]));
}

// The chunks of a piece of a row as they lie in the caller's memory; zeros for a missing row.
struct Piece {
  uint4 chunk[kCombinePiece];
  __device__ __forceinline__ void load(const CombineOp& a, const std::uint16_t* row, int first, int chunks, int lane) {
#pragma unroll
    for (int u = 0; u < kCombinePiece; ++u)
      if (u < chunks) chunk[u] = row ? load_row(a, row, first + u, lane) : make_uint4(0, 0, 0, 0);
  }
};

// A message that rows go back to, as dispatch recorded it: lane e has row and place of entry e.
struct Message {
  int token, entries;
  int place;
  const std::uint16_t* row;
};
__device__ __forceinline__ Message load_message(const CombineOp& a, int rank, int number, int lane) {
  const auto* at = reinterpret_cast<const int2*>(a.records + a.record.message_of(rank, a.route.max_tokens, number));
  const int2 head = __ldg(at);
  const int2 entry = lane < a.route.topk ? __ldg(at + 1 + lane) : make_int2(-1, 0);
  Message m;
  m.token = head.x >= 0 && head.x < a.route.max_tokens ? head.x : 0;
  m.entries = head.y < a.route.topk ? head.y : a.route.topk;
  m.place = entry.y & 31;
  m.row = lane < m.entries ? row_at(a, entry.x) : nullptr;
  return m;
}

// Where a row that is not summed goes: in the sender's slot while rows of all entries fit there, else to an area that all
// senders share, by the parity of the owner's operation.
__device__ __forceinline__ std::uint8_t* row_in_slot(const CombineOp& a, std::uint8_t* slot, int message, int entry) {
  return slot + (std::int64_t{message} * a.route.topk + entry) * a.shape.row_bytes;
}
__device__ __forceinline__ std::uint8_t* row_by_place(const CombineOp& a, std::uint8_t* areas, std::uint32_t parity,
                                                      int token, int place) {
  return areas + a.op.layout.exact_of(parity) + (std::int64_t{token} * a.route.topk + place) * a.shape.row_bytes;
}

// Rows as they are: entries `first_entry`, first_entry + a.split, ...; `rows` holds the first one's piece.
template <int kLanes>
__device__ __forceinline__ void send_rows(const CombineOp& a, const Peer& peer, const Message& m, int number,
                                          Piece& rows, int piece, int first_entry) {
  const int lane = threadIdx.x % 32, first = piece * a.shape.per, chunks = a.shape.chunks_of(piece);
  const auto address = reinterpret_cast<unsigned long long>(m.row);
#pragma unroll 1
  for (int e = first_entry; e < m.entries; e += a.split) {
    const int place = __shfl_sync(~0u, m.place, e);
    std::uint8_t* to = a.rows == Rows::kInSlot ? row_in_slot(a, peer.remote, number, e)
                                               : row_by_place(a, peer.exact, peer.parity, m.token, place);
    PieceSender<kLanes> out(a.shape, to + piece * a.shape.piece_bytes, peer.tag_out);
    if (e != first_entry)
      rows.load(a, reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, address, e)), first, chunks, lane);
#pragma unroll
    for (int u = 0; u < kCombinePiece; ++u)
      if (u < chunks) out.send(u, lane, rows.chunk[u]);
    out.finish(lane);
  }
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

// A piece of the weighed sum of a message's rows, in order of places; `rows` holds the first row's.
template <int kLanes>
__device__ __forceinline__ void send_sum(const CombineOp& a, const Shared& s, int rank, const Message& m, int number,
                                         Piece& rows, int piece) {
  const int lane = threadIdx.x % 32, first = piece * a.shape.per, chunks = a.shape.chunks_of(piece);
  std::uint32_t weight;
  if (!await_weights(a, s, rank, m, &weight)) return;
  const Peer& peer = s.peers[rank];
  const auto address = reinterpret_cast<unsigned long long>(m.row);
  float sum[kCombinePiece][8] = {};
#pragma unroll 1
  for (int e = 0; e < m.entries; ++e) {
    const std::uint32_t bits = __shfl_sync(~0u, weight, e);
    if (e > 0) rows.load(a, reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, address, e)), first, chunks, lane);
    if (bits == kNoWeight) continue;
#pragma unroll
    for (int u = 0; u < kCombinePiece; ++u)
      if (u < chunks) add_weighted(sum[u], __uint_as_float(bits), rows.chunk[u]);
  }
  PieceSender<kLanes> out(a.shape, peer.remote + std::int64_t{number} * a.shape.row_bytes + piece * a.shape.piece_bytes,
                          peer.tag_out);
#pragma unroll
  for (int u = 0; u < kCombinePiece; ++u)
    if (u < chunks) out.send(u, lane, rounded(sum[u]));
  out.finish(lane);
}

// Item `item` of the grid is (message, source, piece, share of the entries), sources in turn.
struct Item {
  int rank, number, piece, entry;
  bool exists;
  Message message;
  Piece rows;
  __device__ __forceinline__ void load(const CombineOp& a, unsigned item) {
    const int lane = threadIdx.x % 32;
    const unsigned others = a.op.ranks - 1, pieces = a.shape.pieces;
    entry = static_cast<int>(item % a.split);
    item /= a.split;
    const unsigned in_turn = item / pieces;
    piece = static_cast<int>(item - in_turn * pieces);
    number = static_cast<int>(others == 1 ? in_turn : in_turn / others);
    rank = a.op.rank + 1 + static_cast<int>(in_turn - number * others);
    if (rank >= a.op.ranks) rank -= a.op.ranks;
    const int count = __ldg(reinterpret_cast<const int*>(a.records + a.record.counts) + rank);
    message = load_message(a, rank, number, lane);
    exists = number < count && message.entries > entry;
    if (exists)
      rows.load(a,
                reinterpret_cast<const std::uint16_t*>(
                    __shfl_sync(~0u, reinterpret_cast<unsigned long long>(message.row), entry)),
                piece * a.shape.per, a.shape.chunks_of(piece), lane);
  }
};
template <int kLanes, bool kSummed>
__device__ __forceinline__ void serve(const CombineOp& a, const Shared& s, Item& item) {
  if (!item.exists || !s.peers[item.rank].active) return;
  if (kSummed)
    send_sum<kLanes>(a, s, item.rank, item.message, item.number, item.rows, item.piece);
  else
    send_rows<kLanes>(a, s.peers[item.rank], item.message, item.number, item.rows, item.piece, item.entry);
}
// The most messages of any source, as far as they were kept.
__device__ __forceinline__ int most_messages(const CombineOp& a) {
  const int lane = threadIdx.x % 32;
  int most = 0;
#pragma unroll 1
  for (int rank = lane; rank < a.op.ranks; rank += 32) {
    const int count = rank == a.op.rank ? 0 : __ldg(reinterpret_cast<const int*>(a.records + a.record.counts) + rank);
    most = count > most ? count : most;
  }
  most = __reduce_max_sync(~0u, most);
  return most < a.route.max_tokens ? most : a.route.max_tokens;
}

// Entry i of an own token: its rank, where its row comes from, its weight.
__device__ __forceinline__ void load_entry(const CombineOp& a, const Shared& s, int token, int place, int at) {
  const std::int64_t entry = std::int64_t{token} * a.route.topk + place;
  const bool wide = a.route.index_bytes == 8;
  const int* words = static_cast<const int*>(a.route.topk_idx) + (wide ? 2 * entry : entry);
  const int low = __ldg(words), high = wide ? __ldg(words + 1) : low >> 31;
  const bool inside = high == 0 && low >= 0 && low < a.op.ranks * a.op.experts;
  s.rank[at] = inside ? rank_of_expert(a.op, low) : -1;
  s.route[at] = __ldg(reinterpret_cast<const int*>(a.records + a.record.routes) + entry);
  s.weight[at] = a.weights[entry];
}
// The weights of this block's tokens to the ranks that hold their rows. One warp.
__device__ void send_weights(const CombineOp& a, const Shared& s, Share share) {
  const int lane = threadIdx.x % 32, topk = a.route.topk, cells = (topk + 2) / 3;
#pragma unroll 1
  for (int token = share.first, slot = 0; token < a.route.num_tokens; token += share.step, ++slot) {
    const int at = slot * topk + lane;
    const int rank = lane < topk ? s.rank[at] : -1;
    const bool remote = rank >= 0 && rank != a.op.rank && s.route[at] >= 0 && s.peers[rank].active;
    const std::uint32_t weight = rank >= 0 ? weight_bits(s.weight[at]) : kNoWeight;
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

// What a token's sum is made of: lane p of the warp holds the p-th contribution in the order of summation.
struct Contribution {
  unsigned long long from;  // a row of lines, or a plain row of our own
  float weight;
  int rank;
  int kind;  // bits below
};
constexpr int kLast = 1;     // of its rank
constexpr int kPartial = 2;  // a rank's sum, not to be weighed
constexpr int kLines = 4;    // else plain
constexpr int kNothing = 8;
template <bool kSummed>
__device__ Contribution contribution_of(const CombineOp& a, const Shared& s, int token, int slot, int* count) {
  const int lane = threadIdx.x % 32, topk = a.route.topk;
  const int at = slot * topk + lane;
  const int rank = lane < topk ? s.rank[at] : -1;
  const int route = rank >= 0 ? s.route[at] : -1;
  const bool own = rank == a.op.rank;
  bool valid = route >= 0 && s.peers[rank].active && (own || route < a.route.max_tokens);
  const unsigned same = __match_any_sync(~0u, valid ? rank : -1 - lane);
  const unsigned before = same & ((1u << lane) - 1);
  Contribution c{0, 0, rank, same >> lane == 1 ? kLast : 0};
  if (valid) {
    c.weight = s.weight[at];
    if (own) {
      c.from = reinterpret_cast<unsigned long long>(row_at(a, route));
    } else {
      const Peer& peer = s.peers[rank];
      c.kind |= kLines;
      if (kSummed) {
        c.kind |= kPartial;
        c.from = reinterpret_cast<unsigned long long>(peer.local + std::int64_t{route} * a.shape.row_bytes);
        valid = before == 0;
      } else {
        c.from = reinterpret_cast<unsigned long long>(
            a.rows == Rows::kInSlot ? row_in_slot(a, const_cast<std::uint8_t*>(peer.local), route, __popc(before))
                                    : row_by_place(a, a.op.data, s.block->number & 1, token, lane));
      }
    }
    valid = valid && c.from != 0;
  }
  const unsigned all = __ballot_sync(~0u, valid);
  *count = __popc(all);
  int turn = __popc(all & ((1u << lane) - 1));
  if (!a.exact) {  // by rank, then place
    turn = 0;
#pragma unroll 1
    for (unsigned left = all; left; left &= left - 1) {
      const int other = __ffs(left) - 1, other_rank = __shfl_sync(~0u, rank, other);
      turn += other_rank < rank || (other_rank == rank && other < lane);
    }
  }
  __syncwarp();
  if (valid) s.turns[turn] = lane;
  __syncwarp();
  const int holder = lane < *count ? s.turns[lane] : 0;
  c.from = __shfl_sync(~0u, c.from, holder);
  c.weight = __shfl_sync(~0u, c.weight, holder);
  c.rank = __shfl_sync(~0u, c.rank, holder);
  c.kind = __shfl_sync(~0u, c.kind, holder);
  if (lane >= *count) c.kind = kNothing;
  return c;
}

// Waits for the last line of a piece of every contribution. Whoever waits long looks at one word of each and at nothing else:
// hundreds of warps that read whole chunks again and again would take the memory's time from what arrives. One warp.
__device__ __forceinline__ void await_pieces(const CombineOp& a, const Shared& s, const Contribution& turn,
                                             int last_tag) {
  bool here = !(turn.kind & kLines);
  const auto* at = reinterpret_cast<const std::uint8_t*>(turn.from) + last_tag;
  const std::uint32_t tag = here ? 0 : s.peers[turn.rank].tag_in;
  Patience patience;
  unsigned polls = 0;
#pragma unroll 1
  for (;;) {
    if (!here) here = load_word(at) == tag;
    const unsigned without = __ballot_sync(~0u, !here);
    if (!without) return;
    const int rank = __shfl_sync(~0u, turn.rank, __ffs(without) - 1);
    if (!warp_patient(a.op, *s.block, rank, polls, patience)) {
      if (threadIdx.x % 32 == 0) fail_peer(a.op, *s.block, s.peers[rank], rank);
      return;  // the sum gives it up at its first look
    }
    __nanosleep(20);
  }
}

// Adds up chunks of one token, one warp: chunk = first, first + step, ...
template <int kLanes, bool kSummed>
__device__ __forceinline__ void sum_token(const CombineOp& a, const Shared& s, int token, int slot, int first,
                                          int step) {
  const int lane = threadIdx.x % 32;
  if (first >= a.shape.chunks) return;
  int count;
  const Contribution turn = contribution_of<kSummed>(a, s, token, slot, &count);
#pragma unroll 1
  for (int chunk = first; chunk < a.shape.chunks; chunk += step) {
    const int piece = static_cast<unsigned>(chunk) / static_cast<unsigned>(a.shape.per),
              c = chunk - piece * a.shape.per;
    const int data_at = piece * a.shape.piece_bytes + c * kChunkBytes;
    const int tail_at = piece * a.shape.piece_bytes + a.shape.per * kChunkBytes +
                        (kLanes == 1 ? (c * 11 + lane / 3) * 16 : lane % 8 * 16);
    if (kSummed) await_pieces(a, s, turn, (piece + 1) * a.shape.piece_bytes - 4);
    float total[8] = {}, group[8] = {};
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kBatch) {
      Arriving<kLanes> in[kBatch];
      unsigned missing = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (begin + u >= count) continue;
        const auto* from = reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, turn.from, begin + u));
        if (__shfl_sync(~0u, turn.kind, begin + u) & kLines) {
          in[u].load(from, data_at, tail_at, lane);
          missing |= 1u << u;
        } else {
          in[u].data = load_row(a, reinterpret_cast<const std::uint16_t*>(from), chunk, lane);
        }
      }
      unsigned lost = 0;
      Patience patience;
      unsigned polls = 0;
#pragma unroll 1
      while (missing) {
#pragma unroll
        for (int u = 0; u < kBatch; ++u) {
          if (!(missing >> u & 1)) continue;
          const int rank = __shfl_sync(~0u, turn.rank, begin + u);
          if (__all_sync(~0u, in[u].fresh(lane, s.peers[rank].tag_in))) {
            missing &= ~(1u << u);
            continue;
          }
          if (!warp_patient(a.op, *s.block, rank, polls, patience)) {
            if (lane == 0) fail_peer(a.op, *s.block, s.peers[rank], rank);
            missing &= ~(1u << u);
            lost |= 1u << u;
            continue;
          }
          in[u].load(reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, turn.from, begin + u)), data_at, tail_at,
                     lane);
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (begin + u >= count || (lost >> u & 1)) continue;
        const int kind = __shfl_sync(~0u, turn.kind, begin + u);
        const uint4 v = kind & kLines ? in[u].value(c, lane) : in[u].data;
        if (kSummed && (kind & kPartial))
          add_plain(total, v);
        else
          add_weighted(group, __shfl_sync(~0u, turn.weight, begin + u), v);
        if (!a.exact && (kind & (kPartial | kLast)) == kLast) {
          add_plain(total, rounded(group));
#pragma unroll
          for (float& value : group) value = 0;
        }
      }
    }
    const int channel = chunk * 256 + lane * 8;
    if (channel < a.hidden)
      __stcs(reinterpret_cast<uint4*>(a.out + std::int64_t{token} * a.hidden + channel),
             a.exact ? rounded(group) : rounded(total));
  }
}

// One block adds everything up again without the ranks that failed.
template <int kLanes, bool kSummed>
__device__ __noinline__ void repair(const CombineOp& a, Shared s) {
  const int topk = a.route.topk, span = (a.route.num_tokens + gridDim.x - 1) / gridDim.x;
#pragma unroll 1
  for (int base = 0; base < a.route.num_tokens; base += span) {
    const int tokens = base + span < a.route.num_tokens ? span : a.route.num_tokens - base;
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens * topk; i += kThreads) load_entry(a, s, base + i / topk, i % topk, i);
    __syncthreads();
#pragma unroll 1
    for (int slot = 0; slot < tokens; ++slot)
      sum_token<kLanes, kSummed>(a, s, base + slot, slot, threadIdx.x / 32, kWarps);
  }
}

// The header of every source: that it is there, and how long it took. One warp.
__device__ void await_headers(const CombineOp& a, const Shared& s) {
#pragma unroll 1
  for (int rank = threadIdx.x % 32; rank < a.op.ranks; rank += 32)
    if (s.peers[rank].active && rank != a.op.rank) await_header(a.op, *s.block, s.peers[rank], rank, a.wait_cost);
  __syncwarp();
}

// Begins the operation, and what only one warp does: headers, weights, and where rows of unsummed sources go.
__device__ __forceinline__ void control(const CombineOp& a, const Shared& s) {
  const Op& op = a.op;
  const int lane = threadIdx.x % 32;
  begin_operation(op, *s.block, s.peers, a.rows == Rows::kByPlace);
  __syncwarp();
  if (!(op.parts & kSends)) return;
  if (blockIdx.x == gridDim.x - 1)
#pragma unroll 1
    for (int rank = lane; rank < op.ranks; rank += 32)
      if (s.peers[rank].active && rank != op.rank) send_header(op, *s.block, s.peers[rank], 0);
  if (a.rows != Rows::kByPlace) return;
#pragma unroll 1
  for (int rank = lane; rank < op.ranks; rank += 32)
    if (s.peers[rank].active && rank != op.rank && s.peers[rank].parity == kUnknownParity)
      await_header(op, *s.block, s.peers[rank], rank, nullptr);
}

}  // namespace
}  // namespace gpu

template <int kLanes, bool kSummed>
__global__ void __launch_bounds__(gpu::kThreads, 1) combine(const __grid_constant__ gpu::CombineOp a) {
  using namespace gpu;
  extern __shared__ __align__(128) std::uint8_t memory[];
  Shared s = carve(a, memory);
  const Share share = share_of_tokens(a);
  const int warp = threadIdx.x / 32, topk = a.route.topk;
  const bool sends = a.op.parts & kSends, receives = a.op.parts & kReceives;
  wait_for_predecessor();
  Item item;
  unsigned next = blockIdx.x + warp * gridDim.x, items = 0;
  item.exists = false;
  if (warp == kControl) {
    control(a, s);
  } else {
    const int tokens =
        share.first < a.route.num_tokens ? (a.route.num_tokens - share.first + share.step - 1) / share.step : 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < tokens * topk; i += kThreads - 32) {
      const unsigned slot = static_cast<unsigned>(i) / static_cast<unsigned>(topk);
      load_entry(a, s, share.first + static_cast<int>(slot) * share.step, i - static_cast<int>(slot) * topk, i);
    }
  }
  if (sends) {
    items = static_cast<unsigned>(most_messages(a)) * (a.op.ranks - 1) * a.shape.pieces * a.split;
    if (next < items) item.load(a, next);
  }
  __syncthreads();
  if (warp == kControl) {
    if (kSummed && sends && !a.row_weights && share.part == 0) send_weights(a, s, share);
    if (receives && blockIdx.x == 0) await_headers(a, s);
  }
  // Sends in rounds; after a round the sums of tokens whose messages were sent, everywhere, at least one round before. What a sum
  // waits for was sent by warps that had not begun to wait for any later message, so no circle can form.
  const unsigned in_round = kWarps * gridDim.x, per_token = (a.op.ranks - 1) * a.shape.pieces * a.split;
  const int first = share.part * kWarps + (kWarps - 1 - warp), step = share.parts * kWarps;
  int token = share.first, slot = 0;
#pragma unroll 1
  for (unsigned past = 0;; past += in_round) {
    const bool all_sent = next >= items;
    if (!all_sent) serve<kLanes, kSummed>(a, s, item);
    if (receives)
#pragma unroll 1
      for (; token < a.route.num_tokens && (all_sent || (token + 1) * per_token <= past); token += share.step, ++slot)
        sum_token<kLanes, kSummed>(a, s, token, slot, first, step);
    if (all_sent) break;
    next += in_round;
    if (next < items) item.load(a, next);
  }
  if (!receives) return finish_sending(a.op);
  if (finish_operation(a.op, *s.block, s.peers)) repair<kLanes, kSummed>(a, s);
}

namespace gpu {
const void* combine_kernel(int lanes, bool summed) {
  if (lanes == 1)
    return summed ? reinterpret_cast<const void*>(combine<1, true>) : reinterpret_cast<const void*>(combine<1, false>);
  return summed ? reinterpret_cast<const void*>(combine<8, true>) : reinterpret_cast<const void*>(combine<8, false>);
}
}  // namespace gpu
}  // namespace nixl::core::ep
