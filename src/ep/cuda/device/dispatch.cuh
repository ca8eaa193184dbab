// What sending and receiving of a dispatch share: parts of a block, its shared memory, a row in the payload's form.
#pragma once
#include "ep/cuda/device/op.cuh"
#include "ep/cuda/device/quantize_chunk.cuh"
#include "ep/cuda/device/route.cuh"
#include "ep/cuda/launch.h"

namespace nixl::core::ep::gpu {

constexpr int kSendThreads = kSenders * 32;
constexpr int kRestThreads = kThreads - kSendThreads;
constexpr int kEarlyPiece = 2;  // most chunks of a piece where few are under way
enum Barrier { kAll, kSending, kResting, kCounting, kRouted, kBegun };

struct Shared {
  Block* block;
  Peer* peers;
  Routes routes;
  int* base;               // [ranks][experts] first row of a source
  std::uint8_t* stage;     // two rows in the payload's form, each followed by its scale words
  std::uint32_t* scratch;  // of this warp
  int stage_bytes;
};

// The pieces of its tokens that a block sends, and their chunks: all of them, or its part.
struct Span {
  int first_piece, pieces, first_chunk, end_chunk;
};
__device__ __forceinline__ Span span_of(const DispatchOp& a, int part) {
  const RowShape& shape = a.shape;
  const int first = static_cast<int>(a.plan.by_parts.quotient(shape.pieces * part));
  const int end = static_cast<int>(a.plan.by_parts.quotient(shape.pieces * (part + 1)));
  return {first, end - first, first * shape.per, min(end * shape.per, shape.chunks)};
}

// Who counts: in a block with tokens the warps that neither stage them nor begin the operation, in the first block all but the latter.
__device__ __forceinline__ Crew counting_crew(bool first_block) {
  const int thread = static_cast<int>(threadIdx.x);
  if (first_block) return {thread < kSendThreads ? thread : thread - 32, kThreads - 32, kCounting};
  return {thread - (kSendThreads + 32), kRestThreads - 32, kCounting};
}

static __device__ Shared carve(const DispatchOp& a, std::uint8_t* memory) {
  __shared__ Block block;
  const DispatchShared& at = a.shared;
  Shared s;
  s.block = &block;
  s.peers = reinterpret_cast<Peer*>(memory + at.peers);
  s.base = reinterpret_cast<int*>(memory + at.base);
  s.routes.per_expert = reinterpret_cast<int*>(memory + at.per_expert);
  s.routes.per_rank = reinterpret_cast<int*>(memory + at.per_rank);
  s.routes.expert = reinterpret_cast<int*>(memory + at.expert);
  s.routes.index = reinterpret_cast<int*>(memory + at.index);
  s.routes.message = reinterpret_cast<int*>(memory + at.message);
  s.stage = memory + at.stage;
  s.stage_bytes = at.stage_bytes;
  s.scratch = reinterpret_cast<std::uint32_t*>(memory + at.scratch) + threadIdx.x / 32 * at.scratch_words;
  return s;
}

__device__ __forceinline__ uint4 load_chunk(const DispatchOp& a, const std::uint16_t* row, int chunk, int lane,
                                            std::uint32_t* scales) {
  if (a.payload == kPayloadBf16) return load_bf16(row, chunk, a.hidden, lane);
  const Quantized done = quantize(load_channels(row, chunk, a.hidden, lane), a.payload != kPayloadFp8);
  *scales = scale_word(done.scale, a.payload, lane);
  return done.bytes;
}

}  // namespace nixl::core::ep::gpu
