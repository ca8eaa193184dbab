// The sending half of a dispatch: a token in the payload's form, its pieces on their way, the counts that receivers need first.
#pragma once
#include "ep/cuda/device/dispatch.cuh"

namespace nixl::core::ep::gpu {

// The sending warps bring chunks of one token into the payload's form, two a warp at a time.
__device__ __forceinline__ void stage_token(const DispatchOp& a, const Span& span, int token, std::uint8_t* stage) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::uint16_t* row = a.x + std::int64_t{token} * a.hidden;
  auto* chunks = reinterpret_cast<uint4*>(stage);
  auto* scales = reinterpret_cast<std::uint32_t*>(stage + a.shape.chunks * kChunkBytes);
#pragma unroll 1
  for (int first = span.first_chunk + warp; first < span.end_chunk; first += 2 * kSenders) {
    const int second = first + kSenders;
    const bool two = second < span.end_chunk;
    if (a.payload == kPayloadBf16) {
      const uint4 one = load_bf16(row, first, a.hidden, lane), other = load_bf16(row, second, a.hidden, lane);
      chunks[first * 32 + lane] = one;
      if (two) chunks[second * 32 + lane] = other;
      continue;
    }
    const Unquantized one = load_channels(row, first, a.hidden, lane);
    const Unquantized other = load_channels(row, second, a.hidden, lane);  // zeros past the row's end
    const auto store = [&](int chunk, const Unquantized& in) {
      const Quantized done = quantize(in, a.payload != kPayloadFp8);
      chunks[chunk * 32 + lane] = done.bytes;
      const std::uint32_t word = scale_word(done.scale, a.payload, lane);
      if (lane < a.chunk_words) scales[chunk * a.chunk_words + lane] = word;
    };
    store(first, one);
    if (two) store(second, other);
  }
}

// What tells the receiver where the row belongs: token, number of entries, then for each the expert and place, the index
// inside (source, expert), and the weight when weights travel. `local`: the token's first entry in the routes. One warp.
__device__ __forceinline__ void write_meta(const DispatchOp& a, const Shared& s, int token, int local, int rank,
                                           std::uint32_t* meta) {
  const int lane = threadIdx.x % 32, topk = a.route.topk;
  const int entry_words = a.with_weights ? 3 : 2;
  const int id = lane < topk ? s.routes.expert[local + lane] : -1;
  const int index = lane < topk ? s.routes.index[local + lane] : -1;
  const bool mine = index >= 0 && rank_of_expert(a.op, id) == rank;
  const unsigned all = __ballot_sync(~0u, mine);
  if (mine) {
    std::uint32_t* words = meta + 2 + __popc(all & ((1u << lane) - 1)) * entry_words;
    words[0] = static_cast<std::uint32_t>(id - rank * a.op.experts) | lane << 16;
    words[1] = index;
    if (a.with_weights) words[2] = bits_of(a.weights[std::int64_t{token} * topk + lane]);
  }
  if (lane == 0) {
    meta[0] = token;
    meta[1] = __popc(all);
  }
  __syncwarp();
}

// What one warp sends of a staged token: pieces of the block's span to every rank that holds one of its experts, (rank, piece) in
// turns. Nothing of it asks for the peers, so it is at hand when they are known.
class Turns {
 public:
  // `local`: the token's first entry in the routes.
  __device__ __forceinline__ Turns(const DispatchOp& a, const Shared& s, const Span& span, int local)
      : pieces_(span.pieces), first_piece_(span.first_piece), piece_(threadIdx.x / 32) {
    const int lane = threadIdx.x % 32;
    message_ = lane < a.route.topk ? s.routes.message[local + lane] : -1;
    rank_ = message_ >= 0 ? rank_of_expert(a.op, s.routes.expert[local + lane]) : 0;
    left_ = __ballot_sync(~0u, message_ >= 0 && rank_ != a.op.rank);
    settle();
  }
  __device__ __forceinline__ bool more() const { return left_ != 0; }
  __device__ __forceinline__ int rank() const { return __shfl_sync(~0u, rank_, __ffs(left_) - 1); }
  __device__ __forceinline__ int message() const { return __shfl_sync(~0u, message_, __ffs(left_) - 1); }
  __device__ __forceinline__ int piece() const { return first_piece_ + piece_; }
  __device__ __forceinline__ void next() {
    piece_ += kSenders;
    settle();
  }

 private:
  __device__ __forceinline__ void settle() {
#pragma unroll 1
    for (; left_ && piece_ >= pieces_; piece_ -= pieces_) left_ &= left_ - 1;
  }
  int pieces_, first_piece_, piece_;
  int message_, rank_;  // of this lane's entry, where it is the first for its rank
  unsigned left_;       // such entries, from the current one on
};

// The words of a piece's tail that come with its chunks, in this warp's scratch: displaced by tags, and scales; returns where the rest
// goes. One warp.
template <int kLanes>
__device__ __forceinline__ std::uint32_t* prepare_tail(const DispatchOp& a, const Shared& s, const std::uint8_t* stage,
                                                       int piece) {
  using Line = Lines<kLanes>;
  const int lane = threadIdx.x % 32, first = piece * a.shape.per, chunks = a.shape.chunks_of(piece);
  const int displaced = chunks * Line::kDisplaced, scale_words = chunks * a.chunk_words;
  const auto* scales =
      reinterpret_cast<const std::uint32_t*>(stage + a.shape.chunks * kChunkBytes) + first * a.chunk_words;
#pragma unroll 1
  for (int i = lane; i < displaced; i += 32) {
    const int at = first + i / Line::kDisplaced, line = i % Line::kDisplaced;
    if (line < Line::kPerChunk)
      s.scratch[i] =
          reinterpret_cast<const std::uint32_t*>(stage + at * kChunkBytes)[(line * kLanes + kLanes - 1) * 4 + 3];
  }
  if (lane < scale_words) s.scratch[displaced + lane] = scales[lane];  // at most 32: kDispatchPiece chunks of four
  return s.scratch + displaced + scale_words;
}
// One piece of a staged token, whose tail is prepared, to one rank. One warp.
template <int kLanes>
__device__ __forceinline__ void push_piece(const DispatchOp& a, const Shared& s, const std::uint8_t* stage,
                                           const Peer& peer, int message, int piece) {
  using Line = Lines<kLanes>;
  const int lane = threadIdx.x % 32;
  const int first = piece * a.shape.per, chunks = a.shape.chunks_of(piece);
  std::uint8_t* to = peer.remote + std::int64_t{message} * a.shape.row_bytes + piece * a.shape.piece_bytes;
#pragma unroll 1
  for (int c = 0; c < chunks; ++c)
    Line::store(to + c * kChunkBytes, lane, reinterpret_cast<const uint4*>(stage + (first + c) * kChunkBytes)[lane],
                peer.tag_out);
  to += a.shape.per * kChunkBytes;
#pragma unroll 1
  for (int t = 0, lines = a.shape.tail_lines; lines > 0; ++t, lines -= Line::kPerChunk) {
    uint4 v = {};
    if (lane < lines * kLanes) {
      const std::uint32_t* words = s.scratch + t * Line::kWords + Line::first_word(lane);
      v = make_uint4(words[0], words[1], words[2], Line::holds_tag(lane) ? 0 : words[3]);
    }
    Line::store(to + t * kChunkBytes, lane, v, peer.tag_out, lines);
  }
  __syncwarp();
}

// A cell of counts for one rank: those of three of its experts.
struct CountCell {
  int rank, cell;
  std::uint32_t counts[3];
  __device__ __forceinline__ void make(const DispatchOp& a, const Shared& s, int i) {
    rank = static_cast<int>(a.by_cells.quotient(i));
    cell = i - rank * a.op.words.cells;
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      const int expert = cell * 3 + q;
      const int count =
          rank < a.op.ranks && expert < a.op.experts ? s.routes.per_expert[rank * a.op.experts + expert] : 0;
      counts[q] = count < a.route.max_tokens ? count : a.route.max_tokens;
    }
  }
};
// The counts of all of this rank's tokens, and its header, to every rank, once the peers are known.
__device__ __forceinline__ void send_counts(const DispatchOp& a, const Shared& s, const Crew& crew) {
  const Op& op = a.op;
  CountCell cell;
  cell.make(a, s, crew.thread);
  sync_some(kBegun, crew.threads + 32);
#pragma unroll 1
  for (int i = crew.thread; i < op.ranks * op.words.cells; i += crew.threads) {
    if (i != crew.thread) cell.make(a, s, i);
    const Peer& peer = s.peers[cell.rank];
    if (!peer.active) continue;
    store_cell(peer.control + op.words.counts_of(op.rank, flag_slot(peer.sent)) + cell.cell * 16,
               make_uint4(cell.counts[0], cell.counts[1], cell.counts[2], peer.tag_out));
  }
#pragma unroll 1
  for (int rank = crew.threads - 1 - crew.thread; rank < op.ranks; rank += crew.threads)
    if (s.peers[rank].active) send_header(op, *s.block, s.peers[rank], rank == op.rank ? 0 : s.routes.per_rank[rank]);
}

}  // namespace nixl::core::ep::gpu
