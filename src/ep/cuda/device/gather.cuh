// Sums of few tokens, by whole blocks: each warp waits for rows of its own and leaves them in shared memory, then every thread adds up
// four channels. Little code, most of it run more than once: what counts here is how many instructions are met for the first time.
#pragma once
#include "ep/cuda/device/combine.cuh"

namespace nixl::core::ep::gpu {

// Chunks that a block adds up at once, two of every piece. Where a row has fewer, one is taken twice.
inline constexpr int kGathered = 2 * kGatheredPieces;

// Where this lane reads inside a row, for pieces [first, first + kGatheredPieces): in lines, in a plain row of our own, in tails.
template <int kLanes>
struct Offsets {
  int line[kGathered], plain[kGathered], tail[kGathered];
  __device__ __forceinline__ Offsets(const CombineOp& a, int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kGathered; ++i) {
      const int piece = min(first + i / 2, a.shape.pieces - 1), c = min(i % 2, a.shape.chunks_of(piece) - 1);
      const int at = (piece * a.shape.per + c) * kChunkBytes + lane * 16, tails = a.shape.per * kChunkBytes;
      line[i] = piece * a.shape.piece_bytes + c * kChunkBytes + lane * 16;
      plain[i] = at < 2 * a.hidden ? at : 0;
      tail[i] = piece * a.shape.piece_bytes + tails + (kLanes == 1 ? (c * 11 + lane / 3) * 16 : lane * 4);
    }
  }
  // Worked out here, not where it is used.
  __device__ __forceinline__ void pin() {
#pragma unroll
    for (int i = 0; i < kGathered; ++i) asm volatile("" : "+r"(line[i]), "+r"(plain[i]), "+r"(tail[i]));
  }
};

// Where the row that is added at `turn` comes from; null: nothing comes.
__device__ __forceinline__ const std::uint8_t* source_of(const CombineOp& a, const Shared& s, const OwnEntry& entry,
                                                         int token, int place) {
  if (entry.rank < 0 || entry.route < 0) return nullptr;
  if (entry.rank == a.op.rank) return reinterpret_cast<const std::uint8_t*>(row_at(a, entry.route));
  const Peer& peer = s.peers[entry.rank];
  if (!peer.active || entry.route >= a.route.max_tokens) return nullptr;
  const bool in_slot = a.rows == Rows::kInSlot;
  const std::int64_t row =
      in_slot ? std::int64_t{entry.route} * a.route.topk + entry.number : std::int64_t{token} * a.route.topk + place;
  return (in_slot ? peer.local : a.op.data + a.op.layout.exact_of(s.block->number & 1)) + row * a.shape.row_bytes;
}

// Waits for the chunks at `at` of the row that is added at `turn` and leaves them in shared memory. One warp.
template <int kLanes>
__device__ __forceinline__ void fetch_row(const CombineOp& a, const Shared& s, int token, int slot, int turn,
                                          const Offsets<kLanes>& at) {
  using Line = Lines<kLanes>;
  const int lane = threadIdx.x % 32, topk = a.route.topk;
  const int place = s.own[slot * topk + turn].place;
  const OwnEntry& entry = s.own[slot * topk + place];
  const int rank = entry.rank;
  const std::uint8_t* from = source_of(a, s, entry, token, place);
  if (lane == 0) s.terms[turn] = {entry.weight, from ? rank : -1};
  if (!from) return;
  const bool own = rank == a.op.rank;
  const std::uint32_t tag = s.peers[rank].tag_in;
  const std::uint32_t of_line = Line::holds_tag(lane) && !own ? ~0u : 0;
  const std::uint32_t of_tail = (kLanes == 1 || lane == 31) && !own ? ~0u : 0;
  uint4 data[kGathered];
  std::uint32_t words[kGathered];  // that tags displaced: with 128-byte lines lane w has word w of the piece's tail
  Patience patience;
  unsigned polls = 0;
#pragma unroll 1
  for (;;) {
    std::uint32_t stale = 0;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kGathered; ++i) {
      const std::uint8_t* p = from + (own ? at.plain[i] : at.line[i]);
      data[i] = kLanes == 1 ? load_cell(p) : load_line(p);
    }
    if (!own) {
#pragma unroll
      for (int i = 0; i < kGathered; ++i) {
        if (kLanes == 1) {
          const uint4 cell = load_cell(from + at.tail[i]);
          words[i] = lane % 3 == 0 ? cell.x : lane % 3 == 1 ? cell.y : cell.z;
          stale |= (cell.w ^ tag) & of_tail;
        } else if (i % 2 == 0) {
          words[i] = load_word(from + at.tail[i]);
          stale |= (words[i] ^ tag) & of_tail;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kGathered; ++i) stale |= (data[i].w ^ tag) & of_line;
    if (!__any_sync(~0u, stale != 0)) break;
    if (warp_patient(a.op, *s.block, rank, polls, patience)) continue;
    if (lane == 0) {
      fail_peer(a.op, *s.block, s.peers[rank], rank);
      s.terms[turn].rank = -1;
    }
    return;
  }
  uint4* to = reinterpret_cast<uint4*>(s.rows + turn * kGathered * kChunkBytes) + lane;
#pragma unroll
  for (int i = 0; i < kGathered; ++i) {
    const std::uint32_t word = kLanes == 1 ? words[i] : __shfl_sync(~0u, words[i / 2 * 2], 4 * (i % 2) + lane / 8);
    if (of_line) data[i].w = word;
    to[i * 32] = data[i];
  }
}

// Four channels of a sum.
struct QuarterSum {
  float total[4] = {}, group[4] = {};
  __device__ __forceinline__ void add(float weight, uint2 v) {
    group[0] = add_rn(group[0], mul_rn(weight, low_value(v.x)));
    group[1] = add_rn(group[1], mul_rn(weight, high_value(v.x)));
    group[2] = add_rn(group[2], mul_rn(weight, low_value(v.y)));
    group[3] = add_rn(group[3], mul_rn(weight, high_value(v.y)));
  }
  // The rows of a rank are complete.
  __device__ __forceinline__ void end_rank() {
    const std::uint32_t low = pack(group[0], group[1]), high = pack(group[2], group[3]);
    total[0] = add_rn(total[0], low_value(low));
    total[1] = add_rn(total[1], high_value(low));
    total[2] = add_rn(total[2], low_value(high));
    total[3] = add_rn(total[3], high_value(high));
#pragma unroll
    for (float& value : group) value = 0;
  }
};

// What a thread adds up: four channels of a chunk, if there is such a chunk.
struct Quarter {
  std::uint16_t* out;  // null: nothing
  __device__ __forceinline__ Quarter(const CombineOp& a, int token, int first) {
    const int thread = threadIdx.x, piece = first + thread / 128, c = thread / 64 % 2;
    const int channel = (piece * a.shape.per + c) * 256 + thread % 64 * 4;
    const bool there = piece < a.shape.pieces && c < a.shape.chunks_of(piece) && channel < a.hidden;
    out = there ? a.out + std::int64_t{token} * a.hidden + channel : nullptr;
  }
};
// Adds up what lies in shared memory. All threads.
__device__ __forceinline__ void add_rows(const CombineOp& a, const Shared& s, std::uint16_t* out) {
  if (!out) return;
  const std::uint8_t* at = s.rows + threadIdx.x * 8;
  QuarterSum sum;
  int rank = -1;
  Term term = s.terms[0];
  uint2 v = *reinterpret_cast<const uint2*>(at);
#pragma unroll 1
  for (int turn = 1;; ++turn) {
    const Term now = term;
    const uint2 row = v;
    const bool more = turn < a.route.topk;
    at += more ? kGathered * kChunkBytes : 0;
    term = s.terms[more ? turn : 0];
    v = *reinterpret_cast<const uint2*>(at);
    if (now.rank >= 0) {
      if (!a.exact && now.rank != rank) sum.end_rank();
      rank = now.rank;
      sum.add(now.weight, row);
    }
    if (!more) break;
  }
  if (!a.exact) sum.end_rank();
  const bool exact = a.exact;
  __stcs(reinterpret_cast<uint2*>(out),
         make_uint2(pack(exact ? sum.group[0] : sum.total[0], exact ? sum.group[1] : sum.total[1]),
                    pack(exact ? sum.group[2] : sum.total[2], exact ? sum.group[3] : sum.total[3])));
}

// The sum of a token, of whose groups of pieces this block takes every `step`-th from `first` on. All threads.
template <int kLanes>
__device__ __forceinline__ void gather_token(const CombineOp& a, const Shared& s, int token, int slot, int first,
                                             int step, const Offsets<kLanes>& offsets) {
  constexpr int kWarps = rows_threads(RowsKind::kFewTokens) / 32;
  Offsets<kLanes> at = offsets;
#pragma unroll 1
  for (int piece = first * kGatheredPieces;;) {
    std::uint16_t* out = Quarter(a, token, piece).out;
    asm volatile("" : "+l"(out));
#pragma unroll 1
    for (int turn = threadIdx.x / 32; turn < a.route.topk; turn += kWarps)
      fetch_row<kLanes>(a, s, token, slot, turn, at);
    __syncthreads();
    add_rows(a, s, out);
    piece += step * kGatheredPieces;
    if (piece >= a.shape.pieces) break;
    at = Offsets<kLanes>(a, piece);
    __syncthreads();
  }
}

}  // namespace nixl::core::ep::gpu
