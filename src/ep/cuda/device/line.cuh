// Accesses to memory that another GPU reads or writes, and lines that carry their own tag (ep/layout/push.h).
#pragma once
#include <cstdint>

#include "ep/layout/push.h"

namespace nixl::core::ep::gpu {

__device__ __forceinline__ uint4 load_line(const void* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_line(void* p, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0],{%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
// One access of 16 bytes in the memory model: arrives whole on any connection.
__device__ __forceinline__ uint4 load_cell(const void* p) {
  unsigned long long lo, hi;
  asm volatile("{.reg .b128 c; ld.relaxed.sys.global.b128 c,[%2]; mov.b128 {%0,%1},c;}"
               : "=l"(lo), "=l"(hi)
               : "l"(p)
               : "memory");
  return make_uint4(static_cast<unsigned>(lo), static_cast<unsigned>(lo >> 32), static_cast<unsigned>(hi),
                    static_cast<unsigned>(hi >> 32));
}
__device__ __forceinline__ void store_cell(void* p, uint4 v) {
  const unsigned long long lo = v.x | static_cast<unsigned long long>(v.y) << 32;
  const unsigned long long hi = v.z | static_cast<unsigned long long>(v.w) << 32;
  asm volatile("{.reg .b128 c; mov.b128 c,{%1,%2}; st.relaxed.sys.global.b128 [%0],c;}" ::"l"(p), "l"(lo), "l"(hi)
               : "memory");
}
// One word alone. Whoever waits long for rows looks at their last tag and no more: hundreds of warps that read whole chunks
// again and again would take the memory's time from the rows that arrive.
__device__ __forceinline__ std::uint32_t load_word(const void* p) {
  std::uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_word(void* p, std::uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ std::uint64_t wall_ns() {
  std::uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
// Barrier among the first or the last warps of a block, or with part of a block that does not wait.
__device__ __forceinline__ void sync_some(int name, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive_some(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// A word of shared memory by which one thread of a block tells the others that what it and those it has met in a barrier
// wrote may be read.
__device__ __forceinline__ void set_flag(int& flag) {
  asm volatile("st.release.cta.shared.u32 [%0],%1;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(&flag))),
               "r"(1)
               : "memory");
}
__device__ __forceinline__ bool flag_set(const int& flag) {
  int v;
  asm volatile("ld.acquire.cta.shared.u32 %0,[%1];"
               : "=r"(v)
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(&flag)))
               : "memory");
  return __all_sync(~0u, v);
}

template <int kLanes>
struct Lines {
  static constexpr int kPerChunk = lines_in_chunk(kLanes);
  static constexpr int kLineWords = words_in_line(kLanes);
  static constexpr int kLineBytes = 16 * kLanes;
  static constexpr int kDisplaced = displaced_in_chunk(kLanes);
  static constexpr int kWords = kPerChunk * kLineWords;  // of tail lines that fill a chunk

  static __device__ __forceinline__ bool holds_tag(int lane) { return lane % kLanes == kLanes - 1; }
  // The first of the (four, or three beside a tag) words of 512 bytes of tail lines that this lane carries.
  static __device__ __forceinline__ int first_word(int lane) { return lane / kLanes * kLineWords + lane % kLanes * 4; }

  // Both are one instruction of the whole warp: a line whose lanes diverged would neither leave nor be seen as a whole.
  // `lines`: how many of the chunk's lines are meant; the lanes of the others take no part.
  static __device__ __forceinline__ uint4 load(const void* chunk, int lane) {
    __syncwarp();
    const auto* p = static_cast<const std::uint8_t*>(chunk) + lane * 16;
    return kLanes == 1 ? load_cell(p) : load_line(p);
  }
  static __device__ __forceinline__ uint4 load(const void* chunk, int lane, int lines) {
    __syncwarp();
    uint4 v = make_uint4(0, 0, 0, 0);
    const auto* p = static_cast<const std::uint8_t*>(chunk) + lane * 16;
    if (lane < lines * kLanes) v = kLanes == 1 ? load_cell(p) : load_line(p);
    return v;
  }
  static __device__ __forceinline__ void store(void* chunk, int lane, uint4 v, std::uint32_t tag,
                                               int lines = kPerChunk) {
    if (holds_tag(lane)) v.w = tag;
    __syncwarp();
    auto* p = static_cast<std::uint8_t*>(chunk) + lane * 16;
    if (lane >= lines * kLanes) return;
    if (kLanes == 1)
      store_cell(p, v);
    else
      store_line(p, v);
  }
  static __device__ __forceinline__ bool fresh(uint4 v, int lane, std::uint32_t tag, int lines = kPerChunk) {
    return lane >= lines * kLanes || !holds_tag(lane) || v.w == tag;
  }
};

}  // namespace nixl::core::ep::gpu
