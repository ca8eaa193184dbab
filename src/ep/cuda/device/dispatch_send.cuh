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
// inside (source, expert), and the weight when weights travel. One warp.
__device__ __forceinline__ void write_meta(const DispatchOp& a, const Shared& s, int token, int rank,
                                           std::uint32_t* meta) {
  const int lane = threadIdx.x % 32, topk = a.route.topk;
  const int entry_words = a.with_weights ? 3 : 2;
  const int local = (token - s.block->first_token) * topk + lane;
  const int id = lane < topk ? s.routes.expert[local] : -1;
  const int index = lane < topk ? s.routes.index[local] : -1;
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
}

// One piece of a staged token to one rank. One warp.
template <int kLanes>
__device__ __forceinline__ void push_piece(const DispatchOp& a, const Shared& s, int token, const std::uint8_t* stage,
                                           int rank, int message, int piece) {
  using Line = Lines<kLanes>;
  const int lane = threadIdx.x % 32;
  const Peer& peer = s.peers[rank];
  const int first = piece * a.shape.per, chunks = a.shape.chunks_of(piece);
  std::uint8_t* to = peer.remote + std::int64_t{message} * a.shape.row_bytes + piece * a.shape.piece_bytes;
#pragma unroll 4
  for (int c = 0; c < chunks; ++c)
    Line::store(to + c * kChunkBytes, lane, reinterpret_cast<const uint4*>(stage + (first + c) * kChunkBytes)[lane],
                peer.tag_out);
  // Words of the tail: displaced by tags, scales, and where the row belongs.
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
  write_meta(a, s, token, rank, s.scratch + displaced + scale_words);
  __syncwarp();
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

// Pieces of a staged token to every rank that holds one of its experts. Warps take (rank, piece) in turns.
template <int kLanes>
__device__ __forceinline__ void push_token(const DispatchOp& a, const Shared& s, int token, const std::uint8_t* stage,
                                           const Span& span) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, topk = a.route.topk;
  const int local = (token - s.block->first_token) * topk + lane;
  const int message = lane < topk ? s.routes.message[local] : -1;
  const int rank = message >= 0 ? rank_of_expert(a.op, s.routes.expert[local]) : 0;
  unsigned left = __ballot_sync(~0u, message >= 0 && rank != a.op.rank && s.peers[rank].active);
#pragma unroll 1
  for (int piece = warp;; piece += kSenders) {
#pragma unroll 1
    for (; left && piece >= span.pieces; piece -= span.pieces) left &= left - 1;
    if (!left) return;
    const int place = __ffs(left) - 1;
    push_piece<kLanes>(a, s, token, stage, __shfl_sync(~0u, rank, place), __shfl_sync(~0u, message, place),
                       span.first_piece + piece);
  }
}

// The counts of all of this rank's tokens, and its header, to every rank. `threads` of one block from `first` on.
__device__ __forceinline__ void send_counts(const DispatchOp& a, const Shared& s, int first, int threads) {
  const Op& op = a.op;
  const int tid = static_cast<int>(threadIdx.x) - first;
#pragma unroll 1
  for (int i = tid; i < op.ranks * op.words.cells; i += threads) {
    const int rank = i / op.words.cells, cell = i % op.words.cells;
    const Peer& peer = s.peers[rank];
    if (!peer.active) continue;
    std::uint32_t w[3];
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      const int expert = cell * 3 + q;
      const int count = expert < op.experts ? s.routes.per_expert[rank * op.experts + expert] : 0;
      w[q] = count < a.route.max_tokens ? count : a.route.max_tokens;
    }
    store_cell(peer.control + op.words.counts_of(op.rank, flag_slot(peer.sent)) + cell * 16,
               make_uint4(w[0], w[1], w[2], peer.tag_out));
  }
#pragma unroll 1
  for (int rank = tid; rank < op.ranks; rank += threads)
    if (s.peers[rank].active) send_header(op, *s.block, s.peers[rank], rank == op.rank ? 0 : s.routes.per_rank[rank]);
}

}  // namespace nixl::core::ep::gpu
