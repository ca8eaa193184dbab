#include <cuda_runtime.h>

#include "backends/samehost/cuda/list_copy.h"

namespace nixl::core::samehost {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr std::uint32_t kInFlight = 8;  // loads a lane keeps in flight: 4 KiB a warp with 16-byte words

// Copies `count` words, a warp together; both sides aligned to the word.
template <typename Word>
__device__ void copy_words(Word* to, const Word* from, std::uint32_t count, std::uint32_t lane) {
  for (std::uint32_t at = lane; at < count; at += 32 * kInFlight) {
    Word held[kInFlight];
#pragma unroll
    for (std::uint32_t u = 0; u < kInFlight; ++u)
      if (at + u * 32 < count) held[u] = __ldcs(from + at + u * 32);
#pragma unroll
    for (std::uint32_t u = 0; u < kInFlight; ++u)
      if (at + u * 32 < count) __stcs(to + at + u * 32, held[u]);
  }
}

// Source off the destination's alignment by 1 to 3 bytes: aligned words are loaded and shifted together. Every word
// loaded holds at least one byte of the source, so nothing outside its pages is touched.
__device__ void copy_shifted(std::uint32_t* to, const unsigned char* from, std::uint32_t count, std::uint32_t lane) {
  const std::uint32_t off = static_cast<std::uint32_t>(reinterpret_cast<std::uint64_t>(from) & 3);
  const std::uint32_t* words = reinterpret_cast<const std::uint32_t*>(from - off);
  for (std::uint32_t at = lane; at < count; at += 32 * kInFlight) {
    std::uint32_t low[kInFlight], high[kInFlight];
#pragma unroll
    for (std::uint32_t u = 0; u < kInFlight; ++u)
      if (at + u * 32 < count) {
        low[u] = __ldcs(words + at + u * 32);
        high[u] = __ldcs(words + at + u * 32 + 1);
      }
#pragma unroll
    for (std::uint32_t u = 0; u < kInFlight; ++u)
      if (at + u * 32 < count) __stcs(to + at + u * 32, __funnelshift_r(low[u], high[u], 8 * off));
  }
}

template <typename Word>
__device__ void copy_body(unsigned char* to, const unsigned char* from, std::uint32_t bytes, std::uint32_t lane) {
  copy_words(reinterpret_cast<Word*>(to), reinterpret_cast<const Word*>(from), bytes / sizeof(Word), lane);
}

__device__ void copy_item(std::uint64_t destination, std::uint64_t source, std::uint32_t bytes, std::uint32_t lane) {
  unsigned char* to = reinterpret_cast<unsigned char*>(destination);
  const unsigned char* from = reinterpret_cast<const unsigned char*>(source);
  const std::uint32_t skew = static_cast<std::uint32_t>((destination ^ source) & 15);
  const std::uint32_t word = skew == 0 ? 16 : (skew & 7) == 0 ? 8 : 4;
  const std::uint32_t head = min(bytes, static_cast<std::uint32_t>(-destination & (word - 1)));
  const std::uint32_t body = (bytes - head) / word * word, tail = bytes - head - body;
  if (lane < head) to[lane] = from[lane];
  if (lane < tail) to[head + body + lane] = from[head + body + lane];
  to += head;
  from += head;
  if (word == 16) {
    copy_body<uint4>(to, from, body, lane);
  } else if (word == 8) {
    copy_body<uint2>(to, from, body, lane);
  } else if ((skew & 3) == 0) {
    copy_body<std::uint32_t>(to, from, body, lane);
  } else {
    copy_shifted(reinterpret_cast<std::uint32_t*>(to), from, body / 4, lane);
  }
}

// A warp reads the columns of `grab` items at once, one a lane, then copies them one after the other.
__global__ void __launch_bounds__(kThreadsPerBlock) list_copy(ListCopy copy, std::uint32_t grab) {
  const std::uint32_t lane = threadIdx.x & 31;
  const std::uint64_t warps = std::uint64_t{gridDim.x} * (kThreadsPerBlock / 32);
  const std::uint64_t warp = std::uint64_t{blockIdx.x} * (kThreadsPerBlock / 32) + threadIdx.x / 32;
  for (std::uint64_t base = warp * grab; base < copy.num_items; base += warps * grab) {
    const std::uint32_t count = static_cast<std::uint32_t>(min(std::uint64_t{grab}, copy.num_items - base));
    std::uint64_t source = 0, destination = 0;
    std::uint32_t length = 0;
    if (lane < count) {
      source = copy.source[base + lane];
      destination = copy.destination[base + lane];
      length = copy.length[base + lane];
    }
    for (std::uint32_t item = 0; item < count; ++item)
      copy_item(__shfl_sync(kAll, destination, item), __shfl_sync(kAll, source, item), __shfl_sync(kAll, length, item),
                lane);
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(copy.blocks_done, 1) == gridDim.x - 1) {
    *copy.blocks_done = 0;
    __threadfence_system();
    *static_cast<volatile std::uint32_t*>(copy.done) = copy.epoch;
  }
}

__global__ void signal(std::uint32_t* done, std::uint32_t epoch) {
  __threadfence_system();
  *static_cast<volatile std::uint32_t*>(done) = epoch;
}

}  // namespace

cudaError_t launch_list_copy(const ListCopy& copy, cudaStream_t stream) {
  const std::uint64_t warps = std::uint64_t{copy.num_blocks} * (kThreadsPerBlock / 32);
  const std::uint64_t share = copy.num_items / warps;
  const std::uint32_t grab = share < 1 ? 1 : share > 32 ? 32 : static_cast<std::uint32_t>(share);
  (void)::cudaGetLastError();  // of an earlier call that was dealt with
  list_copy<<<copy.num_blocks, kThreadsPerBlock, 0, stream>>>(copy, grab);
  return ::cudaGetLastError();
}

cudaError_t launch_signal(std::uint32_t* done, std::uint32_t epoch, cudaStream_t stream) {
  (void)::cudaGetLastError();
  signal<<<1, 1, 0, stream>>>(done, epoch);
  return ::cudaGetLastError();
}

}  // namespace nixl::core::samehost
