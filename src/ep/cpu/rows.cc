#include "ep/cpu/rows.h"

#include <algorithm>
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

namespace nixl::core::ep {

namespace {

constexpr int kBlock = 64;  // channels summed in registers at a time

}  // namespace

void copy_row(void* to, const void* from, std::int64_t bytes) noexcept {
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

NIXL_VECTORISED
static std::uint16_t group_magnitude(const std::uint16_t* x) noexcept {
  std::uint16_t largest = 0;
  for (int i = 0; i < kGroup; ++i) {
    const std::uint16_t size = x[i] & 0x7fff;
    const std::uint16_t counted = size > 0x7f80 ? 0 : size;
    largest = std::max(largest, counted);
  }
  return largest;
}

NIXL_VECTORISED
static void quantize_group(const std::uint16_t* x, float factor, std::uint8_t* values) noexcept {
  for (int i = 0; i < kGroup; ++i) values[i] = e4m3_from_float(mul_rn(float_from_bf16(x[i]), factor));
}

void quantize_row(const std::uint16_t* x, std::int64_t hidden, int payload, std::uint8_t* values,
                  std::uint32_t* words) noexcept {
  const bool powers = payload != kPayloadFp8;
  auto* bytes = reinterpret_cast<std::uint8_t*>(words);
  for (std::int64_t group = 0; group < hidden / kGroup; ++group) {
    const GroupScale scale = group_scale(group_magnitude(x + group * kGroup), powers);
    quantize_group(x + group * kGroup, scale.factor, values + group * kGroup);
    if (payload == kPayloadFp8Ue8m0)
      bytes[group] = scale.biased;
    else
      words[group] = bits_of(scale.stored);
  }
}

NIXL_VECTORISED
static void sum_weighted_block(const WeightedRow* rows, std::size_t count, std::int64_t at,
                               std::uint16_t* out) noexcept {
  float sum[kBlock] = {};
  for (std::size_t r = 0; r < count; ++r) {
    const std::uint16_t* row = rows[r].row + at;
    const float weight = rows[r].weight;
    for (int i = 0; i < kBlock; ++i) sum[i] = add_weighted(sum[i], weight, row[i]);
  }
  for (int i = 0; i < kBlock; ++i) out[at + i] = bf16_from_float(sum[i]);
}

void sum_weighted(std::span<const WeightedRow> rows, std::int64_t hidden, std::uint16_t* out) noexcept {
  std::int64_t at = 0;
  for (; at + kBlock <= hidden; at += kBlock) sum_weighted_block(rows.data(), rows.size(), at, out);
  for (; at < hidden; ++at) {
    float sum = 0;
    for (const WeightedRow& row : rows) sum = add_weighted(sum, row.weight, row.row[at]);
    out[at] = bf16_from_float(sum);
  }
}

NIXL_VECTORISED
static void sum_partials_block(const std::uint16_t* const* rows, std::size_t count, std::int64_t at,
                               std::uint16_t* out) noexcept {
  float sum[kBlock] = {};
  for (std::size_t r = 0; r < count; ++r) {
    const std::uint16_t* row = rows[r] + at;
    for (int i = 0; i < kBlock; ++i) sum[i] = add_partial(sum[i], row[i]);
  }
  for (int i = 0; i < kBlock; ++i) out[at + i] = bf16_from_float(sum[i]);
}

void sum_partials(std::span<const std::uint16_t* const> rows, std::int64_t hidden, std::uint16_t* out) noexcept {
  std::int64_t at = 0;
  for (; at + kBlock <= hidden; at += kBlock) sum_partials_block(rows.data(), rows.size(), at, out);
  for (; at < hidden; ++at) {
    float sum = 0;
    for (const std::uint16_t* row : rows) sum = add_partial(sum, row[at]);
    out[at] = bf16_from_float(sum);
  }
}

}  // namespace nixl::core::ep
