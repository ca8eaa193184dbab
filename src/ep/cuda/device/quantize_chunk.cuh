// A chunk of a row in the payload's form: 512 bytes a warp, 16 a lane, and the scale of the lane's group.
#pragma once
#include <cuda_fp8.h>

#include "ep/layout/layout.h"
#include "ep/layout/quantize.h"

namespace nixl::core::ep::gpu {

__device__ __forceinline__ uint4 load_bf16(const std::uint16_t* row, int chunk, int hidden, int lane) {
  const int channel = chunk * 256 + lane * 8;
  return channel < hidden ? __ldg(reinterpret_cast<const uint4*>(row + channel)) : make_uint4(0, 0, 0, 0);
}

struct Quantized {
  uint4 bytes;
  GroupScale scale;
};
struct Unquantized {
  uint4 low, high;
};
__device__ __forceinline__ Unquantized load_channels(const std::uint16_t* row, int chunk, int hidden, int lane) {
  const int channel = chunk * 512 + lane * 16;
  Unquantized in{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  if (channel < hidden) {
    in.low = __ldg(reinterpret_cast<const uint4*>(row + channel));
    in.high = __ldg(reinterpret_cast<const uint4*>(row + channel) + 1);
  }
  return in;
}
__device__ __forceinline__ std::uint32_t larger_pair(std::uint32_t so_far, std::uint32_t pair) {
  const std::uint32_t size = pair & 0x7fff7fff;
  return __vmaxu2(so_far, size & ~__vcmpgtu2(size, 0x7f807f80));
}
__device__ __forceinline__ std::uint32_t fp8_pair(std::uint32_t pair, float factor) {
  const float2 values =
      make_float2(mul_rn(float_from_bits(pair << 16), factor), mul_rn(float_from_bits(pair & 0xffff0000), factor));
  return __nv_cvt_float2_to_fp8x2(values, __NV_SATFINITE, __NV_E4M3);
}
// Eight lanes hold a group of 128 channels.
__device__ __forceinline__ Quantized quantize(const Unquantized& in, bool power_of_two_scale) {
  const std::uint32_t words[8] = {in.low.x, in.low.y, in.low.z, in.low.w, in.high.x, in.high.y, in.high.z, in.high.w};
  std::uint32_t largest = 0;
  // NaN compares larger than anything: the maximum shows whether there is one, which is rare.
#pragma unroll
  for (int i = 0; i < 8; ++i) largest = __vmaxu2(largest, words[i] & 0x7fff7fff);
  if (__any_sync(~0u, (largest & 0xffff) > 0x7f80 || largest >> 16 > 0x7f80)) {
    largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = larger_pair(largest, words[i]);
  }
#pragma unroll
  for (int other = 1; other < 8; other <<= 1) largest = __vmaxu2(largest, __shfl_xor_sync(~0u, largest, other));
  const std::uint32_t low = largest & 0xffff, high = largest >> 16;
  Quantized out;
  out.scale = group_scale(static_cast<std::uint16_t>(low > high ? low : high), power_of_two_scale);
  std::uint32_t packed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    packed[i] = fp8_pair(words[2 * i], out.scale.factor) | fp8_pair(words[2 * i + 1], out.scale.factor) << 16;
  out.bytes = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  return out;
}
// The scale words of a chunk, by word: fp32 of group `word`, or the four exponents of the chunk. All lanes call.
__device__ __forceinline__ std::uint32_t scale_word(const GroupScale& scale, int payload, int word) {
  if (payload != kPayloadFp8Ue8m0) return __shfl_sync(~0u, bits_of(scale.stored), (word & 3) * 8);
  const std::uint32_t own = scale.biased;
  return __shfl_sync(~0u, own, 0) | __shfl_sync(~0u, own, 8) << 8 | __shfl_sync(~0u, own, 16) << 16 |
         __shfl_sync(~0u, own, 24) << 24;
}

}  // namespace nixl::core::ep::gpu
