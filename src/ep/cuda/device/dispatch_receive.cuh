// The receiving half of a dispatch: where each source's rows begin, pieces as they come, rows in their places, and what is recorded of
// them for the combines to come.
#pragma once
#include "ep/cuda/device/dispatch.cuh"

namespace nixl::core::ep::gpu {

// Headers and counts of all sources: what came, and where each source's rows begin. `threads` of the block from `first` on.
static __device__ void receive_counts(const DispatchOp& a, const Shared& s, int first, int threads, int name) {
  const Op& op = a.op;
  const int tid = static_cast<int>(threadIdx.x) - first;
#pragma unroll 1
  for (int rank = tid; rank < op.ranks; rank += threads)
    if (s.peers[rank].active) await_header(op, *s.block, s.peers[rank], rank, a.wait_cost);
#pragma unroll 1
  for (int i = threads - 1 - tid; i < op.ranks * op.words.cells; i += threads) {
    const int rank = static_cast<int>(a.by_cells.quotient(i)), cell = i - rank * op.words.cells;
    Peer& peer = s.peers[rank];
    const void* at = op.control + op.words.counts_of(rank, flag_slot(peer.expected)) + cell * 16;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (peer.active) {
      Patience patience;
      unsigned polls = 0;
      const std::uint32_t tag = peer.tag_in;
#pragma unroll 1
      while ((v = load_cell(at)).w != tag)
        if (!patient(op, *s.block, rank, polls, patience)) {
          fail_peer(op, *s.block, peer, rank);
          v = make_uint4(0, 0, 0, 0);
          break;
        }
    }
    const std::uint32_t w[3] = {v.x, v.y, v.z};
#pragma unroll
    for (int q = 0; q < 3; ++q) {
      const int expert = cell * 3 + q;
      const auto most = static_cast<std::uint32_t>(a.route.max_tokens);
      if (expert < op.experts) s.base[rank * op.experts + expert] = static_cast<int>(w[q] < most ? w[q] : most);
    }
  }
  sync_some(name, threads);
#pragma unroll 1
  for (int expert = tid; expert < op.experts; expert += threads) {
    int sum = 0;
#pragma unroll 1
    for (int rank = 0; rank < op.ranks; ++rank) {
      const int count = s.peers[rank].active ? s.base[rank * op.experts + expert]
                                             : 0;  // after the barrier: failed anywhere in the block
      s.base[rank * op.experts + expert] = sum;
      sum += count;
    }
  }
  if (tid == threads - 1) {
    int most = 0;
#pragma unroll 1
    for (int rank = 0; rank < op.ranks; ++rank)
      if (s.peers[rank].active && s.peers[rank].messages > most) most = s.peers[rank].messages;
    s.block->most_messages = most < a.route.max_tokens ? most : a.route.max_tokens;
    s.block->cursor = 0;
  }
  sync_some(name, threads);
  if (tid == 0) set_flag(s.block->counted);
}

// What the caller learns about counts; `threads` as above, of one block. A repair adds to the statistics what changed.
static __device__ void write_ranges(const DispatchOp& a, const Shared& s, int first, int threads, bool repair) {
  const Op& op = a.op;
#pragma unroll 1
  for (int rank = static_cast<int>(threadIdx.x) - first; rank < op.ranks; rank += threads) {
    const int messages = s.peers[rank].active && rank != op.rank ? s.peers[rank].messages : 0;
    reinterpret_cast<int*>(a.records + a.record.counts)[rank] =
        messages < a.route.max_tokens ? messages : a.route.max_tokens;
  }
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x) - first; i < op.experts * op.ranks; i += threads) {
    const int expert = i / op.ranks, rank = i % op.ranks;
    const int begin = s.base[rank * op.experts + expert];
    int end;
    if (rank + 1 < op.ranks) {
      end = s.base[(rank + 1) * op.experts + expert];
    } else {
      int last = 0;
      if (s.peers[rank].active) {
        const uint4 v =
            load_cell(op.control + op.words.counts_of(rank, flag_slot(s.peers[rank].expected)) + expert / 3 * 16);
        last = static_cast<int>(expert % 3 == 0 ? v.x : expert % 3 == 1 ? v.y : v.z);
        last = last < a.route.max_tokens ? last : a.route.max_tokens;
      }
      end = begin + last;
      if (a.recv_stats) atomicAdd(a.recv_stats + expert, end - (repair ? a.recv_count[expert] : 0));
      a.recv_count[expert] = end;
    }
    a.layout_range[std::int64_t{expert} * op.ranks + rank] = make_range(begin, end - begin);
  }
}

// A row of the outputs; a lane holds it for one entry.
struct Target {
  std::uint8_t* bytes = nullptr;
  std::uint32_t* scales = nullptr;  // its first word; the next is `rows` further
  int row = 0;                      // over all local experts
};
__device__ __forceinline__ Target target_of(const DispatchOp& a, int expert, int row) {
  const int rows = a.op.ranks * a.route.max_tokens;
  Target to;
  to.row = expert * rows + row;
  to.bytes = a.recv_x + std::int64_t{to.row} * a.row_bytes;
  to.scales = a.recv_scales + std::int64_t{expert} * a.scale_words * rows + row;
  return to;
}
__device__ __forceinline__ void write_row_info(const DispatchOp& a, const Target& to, int token, int place,
                                               std::uint32_t weight) {
  a.src_info[to.row] = token;
  if (a.recv_places) a.recv_places[to.row] = static_cast<std::uint8_t>(place);
  if (a.recv_weights) a.recv_weights[to.row] = float_from_bits(weight);
}
// Chunks [first, first + chunks) of a row to the targets that the lanes of `held` have; lane w holds scale word w of these chunks.
template <int kChunks>
__device__ __forceinline__ void write_rows(const DispatchOp& a, const Target& target, unsigned held, int first,
                                           int chunks, const uint4 (&data)[kChunks], std::uint32_t scale) {
  const int lane = threadIdx.x % 32, offset = first * kChunkBytes + lane * 16, word = first * a.chunk_words + lane;
  const bool scaled = lane < chunks * a.chunk_words && word < a.scale_words;
  const std::int64_t scale_at = std::int64_t{word} * a.op.ranks * a.route.max_tokens;
#pragma unroll 1
  for (; held; held &= held - 1) {
    const int e = __ffs(held) - 1;
    auto* bytes =
        reinterpret_cast<std::uint8_t*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(target.bytes), e)) +
        offset;
    auto* scales =
        reinterpret_cast<std::uint32_t*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(target.scales), e));
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (c < chunks && offset + c * kChunkBytes < a.row_bytes)
        __stcs(reinterpret_cast<uint4*>(bytes + c * kChunkBytes), data[c]);
    if (scaled) scales[scale_at] = scale;
  }
}

// A piece of a message: item i of the grid is (message, source, piece), sources in turn.
struct Item {
  int rank, message, piece;
  __device__ __forceinline__ Item(const DispatchOp& a, unsigned item) {
    const unsigned others = a.op.ranks - 1, pieces = a.shape.pieces, ordinal = a.by_pieces.quotient(item);
    piece = static_cast<int>(item - ordinal * pieces);
    message = static_cast<int>(a.by_others.quotient(ordinal));
    rank = a.op.rank + 1 + static_cast<int>(ordinal - message * others);
    if (rank >= a.op.ranks) rank -= a.op.ranks;
  }
  __device__ __forceinline__ bool exists(const Shared& s) const {
    return s.peers[rank].active && message < s.peers[rank].messages;
  }
};

// The words of tail line t of a piece, without tags, into this warp's scratch.
template <int kLanes>
__device__ __forceinline__ void keep_words(const Shared& s, int t, int lines, uint4 v) {
  using Line = Lines<kLanes>;
  const int lane = threadIdx.x % 32;
  if (lane >= lines * kLanes) return;
  std::uint32_t* words = s.scratch + t * Line::kWords + Line::first_word(lane);
  words[0] = v.x;
  words[1] = v.y;
  words[2] = v.z;
  if (!Line::holds_tag(lane)) words[3] = v.w;
}

// Waits for the lines of a piece: chunks into `data`, the words of the tail into this warp's scratch. False: it does not come.
// kEarly: how many messages come may not be known yet. One warp.
template <int kLanes, int kChunks, bool kEarly>
__device__ __forceinline__ bool await_piece(const DispatchOp& a, const Shared& s, const Item& item,
                                            uint4 (&data)[kChunks]) {
  using Line = Lines<kLanes>;
  const int lane = threadIdx.x % 32;
  Peer& peer = s.peers[item.rank];
  const std::uint8_t* from =
      peer.local + std::int64_t{item.message} * a.shape.row_bytes + item.piece * a.shape.piece_bytes;
  const int chunks = a.shape.chunks_of(item.piece);
  const std::uint32_t tag = peer.tag_in;
  // Few pieces are under way: look at everything at once. Else the last tag tells that the rest mostly is there.
  const bool eager = kEarly || a.shape.per <= kEarlyPiece;
  Patience patience;
  unsigned polls = 0;
  if (!eager) {
    const std::uint8_t* last = from + a.shape.piece_bytes - 4;
#pragma unroll 1
    while (!__all_sync(~0u, load_word(last) == tag) && warp_patient(a.op, *s.block, item.rank, polls, patience))
      __nanosleep(20);
  }
  const std::uint8_t* tail_at = from + a.shape.per * kChunkBytes;
  const int first_lines = a.shape.tail_lines < Line::kPerChunk ? a.shape.tail_lines : Line::kPerChunk;
  bool counted = !kEarly;
#pragma unroll 1
  for (;;) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (c < chunks) data[c] = Line::load(from + c * kChunkBytes, lane);
    uint4 tail = Line::load(tail_at, lane, first_lines);
    bool fresh = Line::fresh(tail, lane, tag, first_lines);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (c < chunks) fresh = fresh && Line::fresh(data[c], lane, tag);
    if (__all_sync(~0u, fresh)) {
      keep_words<kLanes>(s, 0, first_lines, tail);
#pragma unroll 1
      for (int t = 1, lines = a.shape.tail_lines - Line::kPerChunk; lines > 0; ++t, lines -= Line::kPerChunk) {
        tail = Line::load(tail_at + t * kChunkBytes, lane, lines);
        fresh = fresh && Line::fresh(tail, lane, tag, lines);
        keep_words<kLanes>(s, t, lines, tail);
      }
      if (__all_sync(~0u, fresh)) return true;
    }
    if (kEarly && !counted) {
      counted = flag_set(s.block->counted);
      if (!counted) continue;
    }
    if (kEarly && !item.exists(s)) return false;
    if (!warp_patient(a.op, *s.block, item.rank, polls, patience)) {
      if (lane == 0) fail_peer(a.op, *s.block, peer, item.rank);
      return false;
    }
  }
}
// Writes an awaited piece wherever its row belongs. One warp.
template <int kLanes, int kChunks>
__device__ __forceinline__ void place_piece(const DispatchOp& a, const Shared& s, const Item& item,
                                            uint4 (&data)[kChunks]) {
  using Line = Lines<kLanes>;
  const int lane = threadIdx.x % 32, chunks = a.shape.chunks_of(item.piece), first = item.piece * a.shape.per;
  __syncwarp();
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (c < chunks && Line::holds_tag(lane)) data[c].w = s.scratch[c * Line::kDisplaced + lane / kLanes];
  const std::uint32_t* scales = s.scratch + chunks * Line::kDisplaced;
  const int num_scales = chunks * a.chunk_words;
  const std::uint32_t* meta = scales + num_scales;
  const int entry_words = a.with_weights ? 3 : 2;
  const int token = meta[0], entries = meta[1];
  auto* record = reinterpret_cast<int2*>(a.records + a.record.message_of(item.rank, a.route.max_tokens, item.message));
  if (item.piece == 0 && lane == 0) record[0] = make_int2(token, entries);
  Target target;
  if (lane < entries) {
    const std::uint32_t* entry = meta + 2 + lane * entry_words;
    const int expert = static_cast<int>(entry[0] & 0xffff), place = static_cast<int>(entry[0] >> 16);
    target = target_of(a, expert, s.base[item.rank * a.op.experts + expert] + static_cast<int>(entry[1]));
    if (item.piece == 0) {
      write_row_info(a, target, token, place, a.with_weights ? entry[2] : 0);
      record[1 + lane] = make_int2(target.row, place);
    }
  }
  write_rows(a, target, __ballot_sync(~0u, lane < entries), first, chunks, data, lane < num_scales ? scales[lane] : 0);
  __syncwarp();
}

// The entries of an own token, one a lane, once it is known where each source's rows begin.
struct OwnEntries {
  int rank;          // of the entry; -1: none
  bool comes, mine;  // it was delivered; its row is on the own rank
  Target row;        // of mine
};
__device__ __forceinline__ OwnEntries own_entries(const DispatchOp& a, const Shared& s, int token) {
  const int lane = threadIdx.x % 32, local = (token - s.block->first_token) * a.route.topk + lane;
  const int id = lane < a.route.topk ? s.routes.expert[local] : -1;
  const int index = lane < a.route.topk ? s.routes.index[local] : -1;
  OwnEntries own;
  own.rank = id >= 0 ? rank_of_expert(a.op, id) : -1;
  own.mine = index >= 0 && own.rank == a.op.rank;
  own.comes = index >= 0 && (own.mine || s.peers[own.rank].active);
  if (own.mine) {
    const int expert = id - a.op.rank * a.op.experts;
    own.row = target_of(a, expert, s.base[a.op.rank * a.op.experts + expert] + index);
  }
  return own;
}
// Records where the rows of own tokens will come from, for the combines of this dispatch. One warp.
__device__ __forceinline__ void write_routes(const DispatchOp& a, const Shared& s) {
  const int lane = threadIdx.x % 32, topk = a.route.topk;
  const unsigned before = (1u << lane) - 1;
#pragma unroll 1
  for (int token = s.block->first_token; token < s.block->end_token; ++token) {
    const OwnEntries own = own_entries(a, s, token);
    const int local = (token - s.block->first_token) * topk;
    const unsigned to_rank = __match_any_sync(~0u, own.rank), same = to_rank & __ballot_sync(~0u, own.comes);
    const int message = lane < topk ? s.routes.message[local + __ffs(to_rank) - 1] : -1;
    const int order = own.comes ? own.rank : a.op.ranks;  // what does not come is last
    int turn = 0;
#pragma unroll 1
    for (int other = 0; other < topk; ++other) {
      const int theirs = __shfl_sync(~0u, order, other);
      turn += theirs < order || (theirs == order && other < lane);
    }
    if (lane >= topk) continue;
    const std::int64_t first = std::int64_t{token} * topk;
    const int route = !own.comes ? -1 : own.mine ? own.row.row : message;
    reinterpret_cast<int2*>(a.records + a.record.routes)[first + lane] = make_int2(route, __popc(same & before));
    (a.records + a.record.turns)[first + turn] = static_cast<std::uint8_t>(lane);
    if (own.mine) write_row_info(a, own.row, token, lane, a.with_weights ? bits_of(a.weights[first + lane]) : 0);
  }
}
// Entries that stay on this rank never touch a line: their token goes straight to its places, from the stage if it is still
// there (tokens from `staged` on), else it is read again. The chunks of a span, by the block's first `warps` warps.
__device__ __forceinline__ void place_own(const DispatchOp& a, const Shared& s, int warps, const Span& span,
                                          int staged) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_chunk = span.first_chunk + warps - 1 - warp;  // the first warps are those that wait for a piece first
  if (first_chunk >= span.end_chunk) return;
#pragma unroll 1
  for (int token = s.block->first_token; token < s.block->end_token; ++token) {
    const OwnEntries own = own_entries(a, s, token);
    const unsigned all = __ballot_sync(~0u, own.mine);
    if (!all) continue;
    const std::uint16_t* row = a.x + std::int64_t{token} * a.hidden;
    const std::uint8_t* stage = s.stage + (token - s.block->first_token) % 2 * s.stage_bytes;
    const auto* scales = reinterpret_cast<const std::uint32_t*>(stage + a.shape.chunks * kChunkBytes);
#pragma unroll 1
    for (int chunk = first_chunk; chunk < span.end_chunk; chunk += warps) {
      std::uint32_t scale = 0;
      uint4 data[1];
      if (token < staged) {
        data[0] = load_chunk(a, row, chunk, lane, &scale);
      } else {
        data[0] = reinterpret_cast<const uint4*>(stage + chunk * kChunkBytes)[lane];
        if (lane < a.chunk_words) scale = scales[chunk * a.chunk_words + lane];
      }
      write_rows(a, own.row, all, chunk, 1, data, scale);
    }
  }
}

// Takes pieces of messages until none is left, from the block's `turn`-th on. One warp at a time; `begin` and `stride` spread
// the items over blocks.
template <int kLanes>
static __device__ void receive_messages(const DispatchOp& a, const Shared& s, int turn, int begin, int stride) {
  const unsigned items = static_cast<unsigned>(s.block->most_messages) * (a.op.ranks - 1) * a.shape.pieces;
  if (static_cast<unsigned>(begin + turn * stride) >= items) return;
#pragma unroll 1
  for (;;) {
    int next = 0;
    if (threadIdx.x % 32 == 0) next = atomicAdd(&s.block->cursor, 1);
    const unsigned number = begin + static_cast<unsigned>(turn + __shfl_sync(~0u, next, 0)) * stride;
    if (number >= items) return;
    const Item item(a, number);
    uint4 data[kDispatchPiece];
    if (item.exists(s) && await_piece<kLanes, kDispatchPiece, false>(a, s, item, data))
      place_piece<kLanes>(a, s, item, data);
  }
}

}  // namespace nixl::core::ep::gpu
