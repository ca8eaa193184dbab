// What both ways of combining share: who adds up which tokens, rows as they lie in the caller's memory, and what dispatch
// recorded of the messages that they go back to.
#pragma once
#include "ep/cuda/device/op.cuh"
#include "ep/cuda/device/piece.cuh"
#include "ep/cuda/launch.h"
#include "ep/layout/reduce.h"

namespace nixl::core::ep::gpu {

// The own tokens of block `block` of the `grid` that add up: first, first + step, ... Where there are at least twice as many blocks as
// tokens, up to `wanted` blocks share a token. Tokens are spread over blocks, so that what arrives first gives every block something to add up.
struct Share {
  int first, step, part, parts;
};
__device__ __forceinline__ Share share_of_tokens(const CombineOp& a, unsigned wanted, unsigned block, unsigned grid) {
  const unsigned n = a.route.num_tokens;
  if (n == 0 || 2 * n > grid) return {static_cast<int>(block), static_cast<int>(grid), 0, 1};
  const unsigned most = grid / n, parts = most < wanted ? most : wanted;
  const unsigned part = block / n;
  return {static_cast<int>(part < parts ? block - part * n : n), static_cast<int>(n), static_cast<int>(part),
          static_cast<int>(parts)};
}

// Sixteen bytes, once; zeros where `there` is false. No branch, so that many of them leave together.
__device__ __forceinline__ uint4 load_if(bool there, const void* p) {
  uint4 v;
  asm volatile(
      "{.reg .pred p; setp.ne.u32 p,%5,0; mov.u32 %0,0; mov.u32 %1,0; mov.u32 %2,0; mov.u32 %3,0;"
      "@p ld.global.cs.v4.u32 {%0,%1,%2,%3},[%4];}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"(static_cast<unsigned>(there)));
  return v;
}
__device__ __forceinline__ uint4 load_row(const CombineOp& a, const std::uint16_t* row, int chunk, int lane) {
  const int channel = chunk * 256 + lane * 8;
  return load_if(row && channel < a.hidden, row + channel);
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
template <int kChunks>
struct Piece {
  uint4 chunk[kChunks];
  __device__ __forceinline__ void load(const CombineOp& a, const std::uint16_t* row, int first, int chunks, int lane) {
#pragma unroll
    for (int u = 0; u < kChunks; ++u) chunk[u] = load_row(a, u < chunks ? row : nullptr, first + u, lane);
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

// An own token's entry: its rank (-1: none), where its row comes from (records), its weight.
struct OwnEntry {
  int rank;
  int route;   // its message, or its row here; -1: nothing comes
  int number;  // among the message's entries
  int place;   // the place that is added at this turn
  float weight;
};
static_assert(sizeof(OwnEntry) == kOwnEntryBytes);
// A block's shared memory: the peers, then the entries of its own tokens.
extern __shared__ __align__(128) std::uint8_t shared_memory[];
// What is added at a turn, once it is here: its weight and rank; -1: nothing comes.
struct Term {
  float weight;
  int rank;
};
struct Shared {
  Block* block;
  Peer* peers;
  OwnEntry* own;       // [own tokens][topk]
  Term* terms;         // [topk], and
  std::uint8_t* rows;  // their rows, of the part of a token that the block adds up together
};
__device__ __forceinline__ Shared carve(const CombineOp& a) {
  __shared__ Block block;
  const CombineShared at = make_combine_shared(a, gridDim.x);
  return {&block, reinterpret_cast<Peer*>(shared_memory + at.peers),
          reinterpret_cast<OwnEntry*>(shared_memory + at.own), reinterpret_cast<Term*>(shared_memory + at.terms),
          shared_memory + at.rows};
}

__device__ __forceinline__ void load_entry(const CombineOp& a, int token, int place, OwnEntry& own) {
  const std::int64_t entry = std::int64_t{token} * a.route.topk + place;
  const bool wide = a.route.index_bytes == 8;
  const int* words = static_cast<const int*>(a.route.topk_idx) + (wide ? 2 * entry : entry);
  const int low = __ldg(words), high = wide ? __ldg(words + 1) : low >> 31;
  const int2 route = __ldg(reinterpret_cast<const int2*>(a.records + a.record.routes) + entry);
  const int turn = __ldg(a.records + a.record.turns + entry);
  const float weight = __ldg(a.weights + entry);
  const bool inside = high == 0 && low >= 0 && low < a.op.ranks * a.op.experts;
  own.rank = inside ? rank_of_expert(a.op, low) : -1;
  own.route = route.x;
  own.number = route.y;
  own.place = a.exact ? place : turn & 31;
  own.weight = weight;
}
// Those of the share's tokens before `end`, by `threads` threads.
__device__ __forceinline__ void load_entries(const CombineOp& a, const Share& share, int end, OwnEntry* own, int thread,
                                             int threads) {
  const int topk = a.route.topk;
  const int tokens = share.first < end ? (end - share.first + share.step - 1) / share.step : 0;
#pragma unroll 1
  for (int i = thread; i < tokens * topk; i += threads) {
    const unsigned slot = static_cast<unsigned>(i) / static_cast<unsigned>(topk);
    load_entry(a, share.first + static_cast<int>(slot) * share.step, i - static_cast<int>(slot) * topk, own[i]);
  }
}

// How many messages each source sent, as far as they were kept: lane r has that of rank r.
__device__ __forceinline__ int load_count(const CombineOp& a, int rank) {
  return rank < a.op.ranks && rank != a.op.rank
             ? __ldg(reinterpret_cast<const int*>(a.records + a.record.counts) + rank)
             : 0;
}
__device__ __forceinline__ int most_messages(const CombineOp& a, int count_of_lane) {
  int most = count_of_lane;
#pragma unroll 1
  for (int rank = 32 + threadIdx.x % 32; rank < a.op.ranks; rank += 32) most = max(most, load_count(a, rank));
  return min(__reduce_max_sync(~0u, most), a.route.max_tokens);
}

// Item `item` of the grid is (message, source, piece, share of the entries), sources in turn. Of its rows, those of kAhead entries
// are loaded with it.
template <int kChunks, int kAhead>
struct Item {
  int rank, number, piece, entry;
  bool exists;
  Message message;
  Piece<kChunks> rows[kAhead];
  // Which it is; needs nothing that the kernel before wrote.
  __device__ __forceinline__ void locate(const CombineOp& a, unsigned item) {
    const unsigned others = a.op.ranks - 1, pieces = a.shape.pieces;
    entry = static_cast<int>(item % a.split);
    item /= a.split;
    const unsigned in_turn = item / pieces;
    piece = static_cast<int>(item - in_turn * pieces);
    number = static_cast<int>(others == 1 ? in_turn : in_turn / others);
    rank = a.op.rank + 1 + static_cast<int>(in_turn - number * others);
    if (rank >= a.op.ranks) rank -= a.op.ranks;
    exists = false;
  }
  __device__ __forceinline__ void load(const CombineOp& a, int count_of_lane) {
    const int lane = threadIdx.x % 32;
    exists = false;
    if (a.op.ranks == 1 || number >= a.route.max_tokens) return;
    message = load_message(a, rank, number, lane);
    const int count = rank < 32 ? __shfl_sync(~0u, count_of_lane, rank) : load_count(a, rank);
    exists = number < count && message.entries > entry;
    if (exists) load_rows(a, entry);
  }
  // Of entries first, first + split, ... as far as there are.
  __device__ __forceinline__ void load_rows(const CombineOp& a, int first) {
    const auto address = reinterpret_cast<unsigned long long>(message.row);
#pragma unroll
    for (int u = 0; u < kAhead; ++u)
      if (const int e = first + u * static_cast<int>(a.split); u == 0 || e < message.entries)
        rows[u].load(a, reinterpret_cast<const std::uint16_t*>(__shfl_sync(~0u, address, e)), piece * a.shape.per,
                     a.shape.chunks_of(piece), threadIdx.x % 32);
  }
};

// The header of every source: that it is there, and how long it took. One warp.
__device__ __forceinline__ void await_headers(const CombineOp& a, Block& block, Peer* peers) {
#pragma unroll 1
  for (int rank = threadIdx.x % 32; rank < a.op.ranks; rank += 32)
    if (peers[rank].active && rank != a.op.rank) await_header(a.op, block, peers[rank], rank, a.wait_cost);
  __syncwarp();
}
// To every peer. One warp of the last block.
__device__ __forceinline__ void send_headers(const CombineOp& a, const Block& block, const Peer* peers) {
  if (blockIdx.x != gridDim.x - 1) return;
#pragma unroll 1
  for (int rank = threadIdx.x % 32; rank < a.op.ranks; rank += 32)
    if (peers[rank].active && rank != a.op.rank) send_header(a.op, block, peers[rank], 0);
}

}  // namespace nixl::core::ep::gpu
