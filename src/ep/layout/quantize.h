// bfloat16, E4M3 and the scales of FP8 payloads, to the bit. Multiplications and additions round once each (never
// fused), powers of two are made from exponent bits, so that host, device and a plain reference agree.
//
// NaN and infinity follow the formulae: amax passes over NaN; an infinite amax makes factor 0 (or 2^-128), stored scale
// infinity. Where a NaN results its bits carry no meaning.
#pragma once
#include <cstdint>
#include <cstring>

#include "ep/layout/shape.h"

namespace nixl::core::ep {

NIXL_HD inline float float_from_bits(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}
NIXL_HD inline std::uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

// Rounded products, sums and quotients: the host is compiled with -ffp-contract=off, the device is told here.
NIXL_HD inline float mul_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
NIXL_HD inline float add_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}
NIXL_HD inline float div_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

NIXL_HD inline float float_from_bf16(std::uint16_t bits) {
  return float_from_bits(static_cast<std::uint32_t>(bits) << 16);
}

// Ties to even; NaN becomes a quiet one.
NIXL_HD inline std::uint16_t bf16_from_float(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const std::uint32_t quiet = ((bits >> 16) & 0x8000) | 0x7fc0;
  return static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// Ties to even, saturating: beyond 448, infinities included, gives 448. The same as __nv_cvt_float_to_fp8 with
// __NV_SATFINITE and __NV_E4M3.
NIXL_HD inline std::uint8_t e4m3_from_float(float value) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t sign = (bits >> 24) & 0x80;
  const std::uint32_t size = bits & 0x7fffffff;
  const std::uint32_t capped = size < 0x43e00000 ? size : 0x43e00000;  // 448
  const std::uint32_t normal = ((capped + 0x7ffff + ((capped >> 20) & 1)) >> 20) - (120u << 3);
  // Below 2^-6 the step is 2^-9: adding 2^14, whose last bit is 2^-9, rounds to it.
  const float shifted = add_rn(float_from_bits(size < 0x3c800000 ? size : 0), 16384.0f);
  const std::uint32_t subnormal = bits_of(shifted) - 0x46800000;
  const std::uint32_t code = size < 0x3c800000 ? subnormal : normal;
  return static_cast<std::uint8_t>(size > 0x7f800000 ? 0x7f : (sign | code));
}
NIXL_HD inline float float_from_e4m3(std::uint8_t code) {
  const std::uint32_t sign = static_cast<std::uint32_t>(code & 0x80) << 24;
  const std::uint32_t size = code & 0x7f;
  if (size == 0x7f) return float_from_bits(sign | 0x7fc00000);
  if (size < 8) return float_from_bits(sign | bits_of(static_cast<float>(size) * (1.0f / 512.0f)));
  return float_from_bits(sign | ((size << 20) + (120u << 23)));
}

// Largest magnitude of a group so far, kept as bf16 bits without sign (they order like the values); NaN is passed over.
NIXL_HD inline std::uint16_t larger_magnitude(std::uint16_t so_far, std::uint16_t bf16_bits) {
  const std::uint16_t size = bf16_bits & 0x7fff;
  return size <= 0x7f80 && size > so_far ? size : so_far;
}

// 2^exponent for exponent in [-149, 128]; 128 gives infinity.
NIXL_HD inline float power_of_two(int exponent) {
  if (exponent >= -126) return float_from_bits(static_cast<std::uint32_t>(exponent + 127) << 23);
  return float_from_bits(1u << (exponent + 149));
}
// Smallest e with 2^e >= ratio, for a positive normal ratio; infinity gives 128.
NIXL_HD inline int exponent_at_least(float ratio) {
  const std::uint32_t bits = bits_of(ratio);
  return static_cast<int>(bits >> 23) - 127 + ((bits & 0x7fffff) != 0 ? 1 : 0);
}

// One group's scale: values are stored as e4m3(x * factor), and read back as value * stored.
struct GroupScale {
  float stored = 1;
  float factor = 1;
  std::uint8_t biased = 127;  // exponent byte of a power of two
};
// magnitude: bf16 bits without sign, as larger_magnitude leaves them.
NIXL_HD inline GroupScale group_scale(std::uint16_t magnitude, bool power_of_two_scale) {
  const float found = float_from_bf16(magnitude);
  const float amax = found > 1e-4f ? found : 1e-4f;
  GroupScale scale;
  if (!power_of_two_scale) {
    scale.stored = mul_rn(amax, 1.0f / 448.0f);
    scale.factor = div_rn(448.0f, amax);
    return scale;
  }
  const int exponent = exponent_at_least(div_rn(amax, 448.0f));
  scale.stored = power_of_two(exponent);
  scale.factor = power_of_two(-exponent);
  scale.biased = static_cast<std::uint8_t>(exponent + 127);
  return scale;
}

}  // namespace nixl::core::ep
