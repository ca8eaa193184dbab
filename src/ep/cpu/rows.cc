#include "ep/cpu/rows.h"

#include <cstring>

#include "ep/layout/layout.h"
#include "ep/layout/quantize.h"
#include "ep/layout/reduce.h"

// Function multiversioning needs resolvers that run before a sanitizer is ready.
#if defined(__x86_64__) && !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
#define NIXL_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define NIXL_VECTORISED
#endif
#define NIXL_INLINE __attribute__((always_inline)) inline

namespace nixl::core::ep {

namespace {

// The arithmetic of quantize.h and reduce.h, kLanes channels at a time; rows_test compares the two over every input.
constexpr int kLanes = 16;
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Words = std::uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = std::uint16_t __attribute__((vector_size(2 * kLanes)));
using Bytes = std::uint8_t __attribute__((vector_size(kLanes)));

constexpr int kVectors = 8;  // summed at a time: 128 channels stay in registers
constexpr std::int64_t kBlock = kVectors * kLanes;

NIXL_INLINE void load(const std::uint16_t* from, Halves& to) {
  std::memcpy(&to, from, sizeof(to));
}
NIXL_INLINE void widen(const Halves& bf16, Floats& out) {
  const Words bits = __builtin_convertvector(bf16, Words) << 16;
  std::memcpy(&out, &bits, sizeof(out));
}
NIXL_INLINE void bits_of(const Floats& value, Words& out) {
  std::memcpy(&out, &value, sizeof(out));
}

// As bf16_from_float.
NIXL_INLINE void store_bf16(const Floats& value, std::uint16_t* to) {
  Words bits;
  bits_of(value, bits);
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = ((bits >> 16) & 0x8000) | 0x7fc0;
  const Words chosen = (bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
  const Halves out = __builtin_convertvector(chosen, Halves);
  std::memcpy(to, &out, sizeof(out));
}

// As e4m3_from_float.
NIXL_INLINE void store_e4m3(const Floats& value, std::uint8_t* to) {
  Words bits;
  bits_of(value, bits);
  const Words sign = (bits >> 24) & 0x80;
  const Words size = bits & 0x7fffffff;
  const Words capped = size < 0x43e00000 ? size : Words{} + 0x43e00000;
  const Words normal = ((capped + 0x7ffff + ((capped >> 20) & 1)) >> 20) - (120u << 3);
  const Words small = size < 0x3c800000 ? size : Words{};
  Floats shifted;
  std::memcpy(&shifted, &small, sizeof(shifted));
  shifted = shifted + 16384.0f;
  Words subnormal;
  bits_of(shifted, subnormal);
  const Words code = sign | (size < 0x3c800000 ? subnormal - 0x46800000 : normal);
  const Bytes out = __builtin_convertvector(size > 0x7f800000 ? Words{} + 0x7f : code, Bytes);
  std::memcpy(to, &out, sizeof(out));
}

// As larger_magnitude over a group.
NIXL_INLINE std::uint16_t group_magnitude(const std::uint16_t* x) {
  Halves largest{};
  for (std::int64_t i = 0; i < kGroup; i += kLanes) {
    Halves size;
    load(x + i, size);
    size &= 0x7fff;
    size = size > 0x7f80 ? Halves{} : size;
    largest = size > largest ? size : largest;
  }
  std::uint16_t out = 0;
  for (int i = 0; i < kLanes; ++i) out = largest[i] > out ? largest[i] : out;
  return out;
}

}  // namespace

void copy_row(void* to, const void* from, std::int64_t bytes) noexcept {
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

NIXL_VECTORISED
void quantize_row(const std::uint16_t* x, std::int64_t hidden, int payload, std::uint8_t* values,
                  std::uint32_t* words) noexcept {
  const bool powers = payload != kPayloadFp8;
  auto* bytes = reinterpret_cast<std::uint8_t*>(words);
  for (std::int64_t group = 0; group < hidden / kGroup; ++group) {
    const GroupScale scale = group_scale(group_magnitude(x + group * kGroup), powers);
    for (std::int64_t i = group * kGroup; i < (group + 1) * kGroup; i += kLanes) {
      Halves half;
      load(x + i, half);
      Floats value;
      widen(half, value);
      store_e4m3(value * scale.factor, values + i);
    }
    if (payload == kPayloadFp8Ue8m0)
      bytes[group] = scale.biased;
    else
      words[group] = bits_of(scale.stored);
  }
}

NIXL_VECTORISED
static void sum_weighted_blocks(const WeightedRow* rows, std::size_t count, std::int64_t end,
                                std::uint16_t* out) noexcept {
  for (std::int64_t at = 0; at < end; at += kBlock) {
    Floats sum[kVectors] = {};
    for (std::size_t r = 0; r < count; ++r) {
      const std::uint16_t* row = rows[r].row + at;
      const float weight = rows[r].weight;
      for (int v = 0; v < kVectors; ++v) {
        Halves half;
        load(row + v * kLanes, half);
        Floats value;
        widen(half, value);
        sum[v] = sum[v] + value * weight;
      }
    }
    for (int v = 0; v < kVectors; ++v) store_bf16(sum[v], out + at + v * kLanes);
  }
}

void sum_weighted(std::span<const WeightedRow> rows, std::int64_t hidden, std::uint16_t* out) noexcept {
  const std::int64_t end = hidden / kBlock * kBlock;
  sum_weighted_blocks(rows.data(), rows.size(), end, out);
  for (std::int64_t at = end; at < hidden; ++at) {
    float sum = 0;
    for (const WeightedRow& row : rows) sum = add_weighted(sum, row.weight, row.row[at]);
    out[at] = bf16_from_float(sum);
  }
}

NIXL_VECTORISED
static void sum_partials_blocks(const std::uint16_t* const* rows, std::size_t count, std::int64_t end,
                                std::uint16_t* out) noexcept {
  for (std::int64_t at = 0; at < end; at += kBlock) {
    Floats sum[kVectors] = {};
    for (std::size_t r = 0; r < count; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        Halves half;
        load(rows[r] + at + v * kLanes, half);
        Floats value;
        widen(half, value);
        sum[v] = sum[v] + value;
      }
    }
    for (int v = 0; v < kVectors; ++v) store_bf16(sum[v], out + at + v * kLanes);
  }
}

void sum_partials(std::span<const std::uint16_t* const> rows, std::int64_t hidden, std::uint16_t* out) noexcept {
  const std::int64_t end = hidden / kBlock * kBlock;
  sum_partials_blocks(rows.data(), rows.size(), end, out);
  for (std::int64_t at = end; at < hidden; ++at) {
    float sum = 0;
    for (const std::uint16_t* row : rows) sum = add_partial(sum, row[at]);
    out[at] = bf16_from_float(sum);
  }
}

}  // namespace nixl::core::ep
