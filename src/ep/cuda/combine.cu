// Combine. The rank that holds a token's rows sends them, or their weighed sum, to the token's owner, which adds what comes.
//
// Which rows of an expert belong to which place of a token's top-k is known from dispatch (places), or owners send it first
// (entries: expert, index, weight of every place). Sums of one rank need the weights, so they use entries.
#include "ep/cuda/device/op.cuh"
#include "ep/cuda/device/route.cuh"
#include "ep/cuda/launch.h"
#include "ep/layout/reduce.h"

namespace nixl::core::ep {
namespace gpu {
namespace {

constexpr int kSendThreads = kSenders * 32;
constexpr int kBatch = 4;  // chunks or rows whose loads are in flight together
enum Barrier { kAll, kSending };

struct Shared {
  Block* block;
  Peer* peers;
  Routes routes;
  int* first;   // [experts][ranks] of the caller's rows: where a source's rows of an expert begin
  int* count;   //                  and how many they are
  int* starts;  // [experts * ranks + 1] rows to send before such a block
};

__device__ Shared carve(const CombineOp& a, std::uint8_t* memory) {
  __shared__ Block block;
  const CombineShared at = make_combine_shared(a, gridDim.x);
  Shared s;
  s.block = &block;
  s.peers = reinterpret_cast<Peer*>(memory + at.peers);
  s.first = reinterpret_cast<int*>(memory + at.first);
  s.count = reinterpret_cast<int*>(memory + at.count);
  s.starts = reinterpret_cast<int*>(memory + at.starts);
  s.routes.per_expert = reinterpret_cast<int*>(memory + at.per_expert);
  s.routes.per_rank = reinterpret_cast<int*>(memory + at.per_rank);
  s.routes.expert = reinterpret_cast<int*>(memory + at.expert);
  s.routes.index = reinterpret_cast<int*>(memory + at.index);
  s.routes.message = reinterpret_cast<int*>(memory + at.message);
  return s;
}

__device__ __forceinline__ uint4 load_row(const CombineOp& a, const std::uint16_t* row, int chunk, int lane) {
  const int channel = chunk * 256 + lane * 8;
  return channel < a.hidden ? __ldcs(reinterpret_cast<const uint4*>(row + channel)) : make_uint4(0, 0, 0, 0);
}
// Ranges that the caller's tensors cannot hold count as empty. Threads [from, kThreads).
__device__ void load_ranges(const CombineOp& a, const Shared& s, int from) {
  const std::int64_t rows = std::int64_t{a.op.ranks} * a.route.max_tokens;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) - from; i < a.op.experts * a.op.ranks; i += kThreads - from) {
    const std::int64_t range = a.layout_range[i];
    s.first[i] = range_first(range);
    s.count[i] = range_valid(range, rows, a.route.max_tokens) ? range_count(range) : 0;
  }
}
// The row of (local expert, source, index inside the two); null when dispatch delivered no such row.
__device__ __forceinline__ const std::uint16_t* find_row(const CombineOp& a, const Shared& s, int expert, int source, int index) {
  const int block = expert * a.op.ranks + source;
  if (index < 0 || index >= s.count[block]) return nullptr;
  const std::int64_t rows = std::int64_t{a.op.ranks} * a.route.max_tokens;
  return a.x + (expert * rows + s.first[block] + index) * a.x_stride;
}

__device__ __forceinline__ float low_value(std::uint32_t pair) { return float_from_bits(pair << 16); }
__device__ __forceinline__ float high_value(std::uint32_t pair) { return float_from_bits(pair & 0xffff0000); }
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

// Sends the chunks of one piece as they are made; collects the words that tags displace for the tail. One warp.
template <int kLanes>
class PieceSender {
  using Line = Lines<kLanes>;
  static constexpr int kMaxTails = kLanes == 1 ? 5 : 1;

 public:
  __device__ PieceSender(std::uint8_t* to, std::uint32_t tag) : to_(to), tag_(tag) {}
  __device__ __forceinline__ void send(int chunk, int lane, uint4 v) {
#pragma unroll
    for (int t = 0; t < kMaxTails; ++t)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int i = t * Line::kWords + Line::first_word(lane) + q;
        const std::uint32_t word = __shfl_sync(~0u, v.w, i % Line::kPerChunk * kLanes + kLanes - 1);
        if (i / Line::kPerChunk == chunk) tail_[t][q] = word;
      }
    Line::store(to_ + chunk * kChunkBytes, lane, v, tag_);
  }
  __device__ __forceinline__ void finish(const RowShape& shape, int lane) {
#pragma unroll
    for (int t = 0; t < kMaxTails; ++t)
      if (t < shape.tails)
        Line::store(to_ + (shape.per + t) * kChunkBytes, lane, make_uint4(tail_[t][0], tail_[t][1], tail_[t][2], tail_[t][3]), tag_);
  }

 private:
  std::uint8_t* to_;
  std::uint32_t tag_;
  std::uint32_t tail_[kMaxTails][4] = {};
};

// Chunks [first, first + kBatch) of a row, as far as they are below `end`; zeros for a missing row.
struct Batch {
  uint4 chunk[kBatch];
  __device__ __forceinline__ void load(const CombineOp& a, const std::uint16_t* row, int first, int end, int lane) {
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      chunk[u] = row && first + u < end ? load_row(a, row, first + u, lane) : make_uint4(0, 0, 0, 0);
  }
};

// A piece of one row as it is; `head` is its first batch.
template <int kLanes>
__device__ __forceinline__ void send_row(const CombineOp& a, const std::uint16_t* row, Batch head, int piece, std::uint8_t* to, std::uint32_t tag) {
  const int lane = threadIdx.x % 32, first = piece * a.shape.per, chunks = a.shape.chunks_of(piece);
  PieceSender<kLanes> out(to + piece * a.shape.piece_bytes, tag);
#pragma unroll 1
  for (int c = 0; c < chunks; c += kBatch) {
    Batch next;
    if (c + kBatch < chunks) next.load(a, row, first + c + kBatch, first + chunks, lane);
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (c + u < chunks) out.send(c + u, lane, head.chunk[u]);
    head = next;
  }
  out.finish(a.shape, lane);
}

// A piece of the weighed sum of a token's rows held here. The lanes of `held` have row and weight of an entry each, in order
// of places.
template <int kLanes>
__device__ __forceinline__ void send_sum(const CombineOp& a, const std::uint16_t* row, float weight, unsigned held, int piece, std::uint8_t* to,
                         std::uint32_t tag) {
  const int lane = threadIdx.x % 32, first = piece * a.shape.per, chunks = a.shape.chunks_of(piece);
  PieceSender<kLanes> out(to + piece * a.shape.piece_bytes, tag);
  const auto address = reinterpret_cast<unsigned long long>(row);
#pragma unroll 1
  for (int c = 0; c < chunks; c += kBatch) {
    float sum[kBatch][8] = {};
#pragma unroll 1
    for (unsigned left = held; left; left &= left - 1) {  // two entries at a time, their loads together
      const int e = __ffs(left) - 1;
      left &= left - 1;
      const int f = left ? __ffs(left) - 1 : e;
      Batch one, two;
      one.load(a, reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, address, e)), first + c, first + chunks, lane);
      if (f != e) two.load(a, reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, address, f)), first + c, first + chunks, lane);
      const float w = __shfl_sync(~0u, weight, e), v = __shfl_sync(~0u, weight, f);
#pragma unroll
      for (int u = 0; u < kBatch; ++u) add_weighted(sum[u], w, one.chunk[u]);
      if (f == e) break;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) add_weighted(sum[u], v, two.chunk[u]);
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u)
      if (c + u < chunks) out.send(c + u, lane, rounded(sum[u]));
  }
  out.finish(a.shape, lane);
}

__device__ __forceinline__ std::uint8_t* exact_row(const CombineOp& a, std::uint8_t* areas, std::uint32_t parity, int token, int place) {
  return areas + a.op.layout.exact_of(parity) + (std::int64_t{token} * a.route.topk + place) * a.shape.row_bytes;
}

// Entry cells of this block's tokens: for every message to a rank {expert | place << 13 | entries << 18, index, weight or
// token, tag}, topk cells apart. A message whose entries were all cut off is one cell without entries. The sending warps.
__device__ void send_entries(const CombineOp& a, const Shared& s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, topk = a.route.topk;
#pragma unroll 1
  for (int token = s.block->first_token + warp; token < s.block->end_token; token += kSenders) {
    const std::int64_t at = std::int64_t{token} * topk + lane;
    const int local = (token - s.block->first_token) * topk;
    const int id = lane < topk ? s.routes.expert[local + lane] : -1;
    const bool inside = id >= 0;
    const int rank = inside ? rank_of_expert(a.op, id) : -1 - lane;
    const int index = inside ? s.routes.index[local + lane] : -1;
    const unsigned same = __match_any_sync(~0u, rank), here = same & __ballot_sync(~0u, index >= 0);
    const unsigned before = (1u << lane) - 1;
    const bool sends = inside && (index >= 0 || (here == 0 && !(same & before)));
    if (!sends || rank == a.op.rank || !s.peers[rank].active) continue;
    const int message = s.routes.message[local + __ffs(same) - 1];
    const std::uint32_t what = (id - rank * a.op.experts) | lane << 13 | __popc(here) << 18;
    store_cell(s.peers[rank].remote + a.entries + (std::int64_t{message} * topk + __popc(here & before)) * 16,
               make_uint4(what, index, a.partials ? bits_of(a.weights[at]) : token, s.peers[rank].tag_out));
  }
}

// One message of a source: waits for its entries, sends the piece of its sum or of each of its rows. One warp.
template <int kLanes>
__device__ void serve_message(const CombineOp& a, const Shared& s, int rank, int message, int piece) {
  const int lane = threadIdx.x % 32, topk = a.route.topk;
  Peer& peer = s.peers[rank];
  const std::uint8_t* cells = peer.local + a.entries + std::int64_t{message} * topk * 16;
  uint4 cell;
  int entries;
  Patience patience;
#pragma unroll 1
  for (;;) {
    cell = lane < topk ? load_cell(cells + lane * 16) : make_uint4(0, 0, 0, 0);
    const bool first = __shfl_sync(~0u, cell.w, 0) == peer.tag_in;
    entries = static_cast<int>(__shfl_sync(~0u, cell.x, 0) >> 18);
    if (__all_sync(~0u, first && (lane >= entries || cell.w == peer.tag_in))) break;
    if (!warp_patient(a.op, *s.block, rank, patience)) {
      if (lane == 0) fail_peer(a.op, *s.block, peer, rank);
      return;
    }
  }
  const std::uint16_t* row = nullptr;
  if (lane < entries && static_cast<int>(cell.x & 8191) < a.op.experts) row = find_row(a, s, cell.x & 8191, rank, cell.y);
  if (a.partials) {
    send_sum<kLanes>(a, row, float_from_bits(cell.z), __ballot_sync(~0u, row != nullptr), piece, peer.remote + std::int64_t{message} * a.shape.row_bytes, peer.tag_out);
    return;
  }
  const auto address = reinterpret_cast<unsigned long long>(row);
#pragma unroll 1
  for (int e = 0; e < entries; ++e) {
    const int token = __shfl_sync(~0u, cell.z, e), place = __shfl_sync(~0u, cell.x, e) >> 13 & 31;
    const auto* from = reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, address, e));
    Batch head;
    head.load(a, from, piece * a.shape.per, piece * a.shape.per + a.shape.chunks_of(piece), lane);
    send_row<kLanes>(a, from, head, piece, exact_row(a, peer.exact, peer.parity, token, place), peer.tag_out);
  }
}
template <int kLanes>
__device__ void serve_messages(const CombineOp& a, const Shared& s) {
  const unsigned others = a.op.ranks - 1, pieces = a.shape.pieces;
  const unsigned items = static_cast<unsigned>(s.block->most_messages) * others * pieces;
#pragma unroll 1
  for (unsigned item = blockIdx.x + threadIdx.x / 32 * gridDim.x; item < items; item += kWarps * gridDim.x) {
    const unsigned in_turn = item / pieces;
    const int piece = static_cast<int>(item - in_turn * pieces);
    const int message = static_cast<int>(in_turn / others);
    int rank = a.op.rank + 1 + static_cast<int>(in_turn - message * others);
    if (rank >= a.op.ranks) rank -= a.op.ranks;
    if (s.peers[rank].active && message < s.peers[rank].messages) serve_message<kLanes>(a, s, rank, message, piece);
  }
}

// Rows whose places are known go out at once, each to its (token, place). All warps. Where: by the parity of the owner's
// operation, which follows from its last header; right after it joined, from its header of this operation.
template <int kLanes>
__device__ void send_rows(const CombineOp& a, const Shared& s) {
  const Op& op = a.op;
  const int lane = threadIdx.x % 32, blocks = op.experts * op.ranks;
  const std::int64_t rows = std::int64_t{op.ranks} * a.route.max_tokens;
  if (threadIdx.x < 32) {
#pragma unroll 1
    for (int rank = lane; rank < op.ranks; rank += 32)
      if (s.peers[rank].active && rank != op.rank && s.peers[rank].parity == kUnknownParity)
        await_header(op, *s.block, s.peers[rank], rank, nullptr);
    __syncwarp();
    int sum = 0;
#pragma unroll 1
    for (int begin = 0; begin < blocks; begin += 32) {
      const int block = begin + lane, rank = block % op.ranks;
      const int own = block < blocks && rank != op.rank && s.peers[rank].active ? s.count[block] : 0;
      int up_to = own;
#pragma unroll
      for (int step = 1; step < 32; step <<= 1) {
        const int other = __shfl_up_sync(~0u, up_to, step);
        if (lane >= step) up_to += other;
      }
      if (block < blocks) s.starts[block] = sum + up_to - own;
      sum += __shfl_sync(~0u, up_to, 31);
    }
    if (lane == 0) s.starts[blocks] = sum;
  }
  __syncthreads();
  const unsigned pieces = a.shape.pieces, items = static_cast<unsigned>(s.starts[blocks]) * pieces;
#pragma unroll 1
  for (unsigned item = blockIdx.x + threadIdx.x / 32 * gridDim.x; item < items; item += kWarps * gridDim.x) {
    const int ordinal = static_cast<int>(item / pieces), piece = static_cast<int>(item - ordinal * pieces);
    int low = 0, high = blocks;  // the last block that starts at or before `ordinal`
#pragma unroll 1
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (s.starts[middle] <= ordinal ? low : high) = middle;
    }
    const int expert = low / op.ranks, rank = low % op.ranks;
    const std::int64_t at = expert * rows + s.first[low] + ordinal - s.starts[low];
    const std::uint16_t* row = a.x + at * a.x_stride;
    Batch head;
    head.load(a, row, piece * a.shape.per, piece * a.shape.per + a.shape.chunks_of(piece), lane);
    const int token = a.src_info[at], place = a.places[at];
    if (token < 0 || token >= a.route.max_tokens || place >= a.route.topk) continue;
    send_row<kLanes>(a, row, head, piece, exact_row(a, s.peers[rank].exact, s.peers[rank].parity, token, place), s.peers[rank].tag_out);
  }
}

// A chunk of a row on its way in, and where the words are that its tags displaced.
template <int kLanes>
struct Arriving {
  using Line = Lines<kLanes>;
  uint4 data, tail;
  __device__ __forceinline__ void load(const RowShape& shape, const std::uint8_t* row, int chunk, int lane) {
    const std::uint8_t* piece = row + chunk / shape.per * shape.piece_bytes;
    const int c = chunk % shape.per;
    data = Line::load(piece + c * kChunkBytes, lane);
    if (kLanes == 1) {
      const int word = c * 32 + lane;
      tail = load_cell(piece + (shape.per + word / Line::kWords) * kChunkBytes + word % Line::kWords / 3 * 16);
    } else {
      tail = Line::load(piece + shape.per * kChunkBytes, lane);
    }
  }
  __device__ __forceinline__ bool fresh(int lane, std::uint32_t tag) const {
    return Line::fresh(data, lane, tag) && (kLanes == 1 ? tail.w == tag : Line::fresh(tail, lane, tag));
  }
  __device__ __forceinline__ uint4 value(const RowShape& shape, int chunk, int lane) const {
    const int word = chunk % shape.per * Line::kPerChunk + lane / kLanes;
    const int in_line = word % Line::kLineWords;
    std::uint32_t w[4] = {tail.x, tail.y, tail.z, tail.w};
    if (kLanes != 1) {
      const int from = word / Line::kLineWords * kLanes + in_line / 4;
#pragma unroll
      for (int q = 0; q < 4; ++q) w[q] = __shfl_sync(~0u, w[q], from);
    }
    const int q = kLanes == 1 ? word % Line::kWords % 3 : in_line % 4;
    uint4 v = data;
    if (Line::holds_tag(lane)) v.w = q == 0 ? w[0] : q == 1 ? w[1] : q == 2 ? w[2] : w[3];
    return v;
  }
};

// What a token's sum is made of: lane p of the warp holds the p-th contribution in the order of summation.
struct Contribution {
  unsigned long long from = 0;  // a row of lines, or a plain row of our own
  float weight = 0;
  int rank = -1;
  bool lines = false;    // else plain
  bool partial = false;  // a rank's sum, not to be weighed
  bool last = false;     // of its rank
};
__device__ Contribution contribution_of(const CombineOp& a, const Shared& s, int token, int* count) {
  const int lane = threadIdx.x % 32, topk = a.route.topk;
  const int local = (token - s.block->first_token) * topk + lane;
  const int id = lane < topk ? s.routes.expert[local] : -1;
  const int index = lane < topk ? s.routes.index[local] : -1;
  const bool inside = id >= 0;
  const int rank = inside ? rank_of_expert(a.op, id) : -1;
  Contribution own;
  own.rank = rank;
  bool valid = inside && index >= 0 && s.peers[rank].active;
  // The sum of a rank's rows comes once; its message is numbered at the first entry for that rank.
  const int message = inside ? s.routes.message[local] : -1;
  if (valid) {
    own.weight = a.weights[std::int64_t{token} * topk + lane];
    if (rank == a.op.rank) {
      const auto* row = find_row(a, s, id - rank * a.op.experts, rank, index);
      own.from = reinterpret_cast<unsigned long long>(row);
      valid = row != nullptr;
    } else if (a.partials) {
      own.lines = own.partial = true;
      own.from = reinterpret_cast<unsigned long long>(s.peers[rank].local + std::int64_t{message} * a.shape.row_bytes);
    } else {
      own.lines = true;
      own.from = reinterpret_cast<unsigned long long>(exact_row(a, a.op.data, s.block->number & 1, token, lane));
    }
  }
  if (a.partials && inside && rank != a.op.rank) valid = message >= 0 && s.peers[rank].active;
  if (valid && own.from == 0) {  // the first entry of a message may itself have been cut off (more rows than fit)
    own.lines = own.partial = true;
    own.from = reinterpret_cast<unsigned long long>(s.peers[rank].local + std::int64_t{message} * a.shape.row_bytes);
  }
  const unsigned all = __ballot_sync(~0u, valid);
  int place = 0;
  bool last = true;
#pragma unroll 1
  for (unsigned left = all; left; left &= left - 1) {
    const int other = __ffs(left) - 1;
    const int other_rank = __shfl_sync(~0u, rank, other);
    place += a.exact ? other < lane : other_rank < rank || (other_rank == rank && other < lane);
    last = last && !(other_rank == rank && other > lane);
  }
  own.last = last;
  // Hands every contribution to the lane of its turn.
  Contribution mine;
  *count = __popc(all);
#pragma unroll 1
  for (int turn = 0; turn < *count; ++turn) {
    const int holder = __ffs(__ballot_sync(~0u, valid && place == turn)) - 1;
    const auto from = __shfl_sync(~0u, own.from, holder);
    const float weight = __shfl_sync(~0u, own.weight, holder);
    const int bits = __shfl_sync(~0u, own.rank << 3 | own.lines << 2 | own.partial << 1 | static_cast<int>(own.last), holder);
    if (lane != turn) continue;
    mine.from = from;
    mine.weight = weight;
    mine.rank = bits >> 3;
    mine.lines = bits >> 2 & 1;
    mine.partial = bits >> 1 & 1;
    mine.last = bits & 1;
  }
  return mine;
}

// Adds up chunks of one token, one warp: chunk = first, first + step, ...
template <int kLanes>
__device__ void sum_token(const CombineOp& a, const Shared& s, int token, int first, int step) {
  const int lane = threadIdx.x % 32;
  int count;
  const Contribution turn = contribution_of(a, s, token, &count);
  const int bits = turn.lines << 2 | turn.partial << 1 | static_cast<int>(turn.last);
#pragma unroll 1
  for (int chunk = first; chunk < a.shape.chunks; chunk += step) {
    float total[8] = {}, group[8] = {};
#pragma unroll 1
    for (int begin = 0; begin < count; begin += kBatch) {
      Arriving<kLanes> in[kBatch];
      const std::uint8_t* from[kBatch];
      int what[kBatch];
      unsigned missing = 0;
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        from[u] = reinterpret_cast<const std::uint8_t*>(__shfl_sync(~0u, turn.from, (begin + u) % 32));
        what[u] = begin + u < count ? __shfl_sync(~0u, bits, begin + u) : 8;
        if (what[u] & 8) continue;
        if (what[u] & 4) {
          in[u].load(a.shape, from[u], chunk, lane);
          missing |= 1u << u;
        } else {
          in[u].data = load_row(a, reinterpret_cast<const std::uint16_t*>(from[u]), chunk, lane);
        }
      }
      Patience patience;
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
          if (!warp_patient(a.op, *s.block, rank, patience)) {
            if (lane == 0) fail_peer(a.op, *s.block, s.peers[rank], rank);
            missing &= ~(1u << u);
            what[u] = 8;
            continue;
          }
          in[u].load(a.shape, from[u], chunk, lane);
        }
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (what[u] & 8) continue;
        const float weight = __shfl_sync(~0u, turn.weight, (begin + u) % 32);
        const uint4 v = what[u] & 4 ? in[u].value(a.shape, chunk, lane) : in[u].data;
        if (what[u] & 2)
          add_plain(total, v);
        else
          add_weighted(group, weight, v);
        if (!a.exact && (what[u] & 3) == 1) {
          add_plain(total, rounded(group));
#pragma unroll
          for (float& value : group) value = 0;
        }
      }
    }
    const int channel = chunk * 256 + lane * 8;
    if (channel < a.hidden)
      __stcs(reinterpret_cast<uint4*>(a.out + std::int64_t{token} * a.hidden + channel), rounded(a.exact ? group : total));
  }
}

// One block adds everything up again without the ranks that failed.
template <int kLanes>
__device__ __noinline__ void repair(const CombineOp& a, Shared& s) {
  const int span = (a.route.num_tokens + gridDim.x - 1) / gridDim.x;
  if (threadIdx.x < kSendThreads) count_before(a.op, a.route, s.routes, 0, kSendThreads, kSending);
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
#pragma unroll 1
    for (int t = token; t < end; ++t) sum_token<kLanes>(a, s, t, threadIdx.x / 32, kWarps);
  }
}

// Headers of all sources, and the most messages any of them sent. One warp.
__device__ void await_headers(const CombineOp& a, const Shared& s) {
  const int lane = threadIdx.x % 32;
  int most = 0;
#pragma unroll 1
  for (int rank = lane; rank < a.op.ranks; rank += 32) {
    if (!s.peers[rank].active || rank == a.op.rank) continue;
    await_header(a.op, *s.block, s.peers[rank], rank, a.wait_cost);
    most = most > s.peers[rank].messages ? most : s.peers[rank].messages;
  }
  most = __reduce_max_sync(~0u, most);
  if (lane == 0) s.block->most_messages = most < a.route.max_tokens ? most : a.route.max_tokens;
}

}  // namespace
}  // namespace gpu

template <int kLanes>
__global__ void __launch_bounds__(gpu::kThreads, 1) combine(const __grid_constant__ gpu::CombineOp a) {
  using namespace gpu;
  extern __shared__ __align__(128) std::uint8_t memory[];
  Shared s = carve(a, memory);
  wait_for_predecessor();
  const int warp = threadIdx.x / 32;
  const bool sends = a.op.parts & kSends, receives = a.op.parts & kReceives;
  const Share share = share_of_tokens(a.route.num_tokens, (a.shape.chunks + kWarps - 1) / kWarps);
  const int begin = share.begin, end = share.end;
  if (warp < kSenders) {
    count_before(a.op, a.route, s.routes, begin, kSendThreads, kSending);
    if (warp == 0) count_own(a.op, a.route, s.routes, begin, end, nullptr);
  } else if (warp == kSenders) {
    if (threadIdx.x % 32 == 0) {
      s.block->first_token = begin;
      s.block->end_token = end;
    }
    begin_operation(a.op, *s.block, s.peers, a.places != nullptr);
  } else {
    load_ranges(a, s, kSendThreads + 32);
  }
  __syncthreads();
  if (sends && warp < kSenders) {
    if (blockIdx.x == gridDim.x - 1)
#pragma unroll 1
      for (int rank = threadIdx.x; rank < a.op.ranks; rank += kSendThreads)
        if (s.peers[rank].active && rank != a.op.rank)
          send_header(a.op, *s.block, s.peers[rank], a.places ? 0 : s.routes.per_rank[rank]);
    if (!a.places && share.part == 0) send_entries(a, s);
  }
  if (sends && a.places) send_rows<kLanes>(a, s);
  if (!receives) return finish_sending(a.op);
  if (!a.places) {
    if (warp == kSenders) await_headers(a, s);
    __syncthreads();
    serve_messages<kLanes>(a, s);
  }
#pragma unroll 1
  for (int token = begin; token < end; ++token) sum_token<kLanes>(a, s, token, share.part * kWarps + warp, share.parts * kWarps);
  if (a.places && blockIdx.x == 0 && warp == kSenders) await_headers(a, s);
  if (finish_operation(a.op, *s.block, s.peers)) repair<kLanes>(a, s);
}

namespace gpu {
const void* combine_kernel(int lanes) {
  return lanes == 1 ? reinterpret_cast<const void*>(combine<1>) : reinterpret_cast<const void*>(combine<8>);
}
}  // namespace gpu
}  // namespace nixl::core::ep
