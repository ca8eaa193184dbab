// Loops over rows of channels: the only place of the path where bytes of tokens are touched. Vectorised for what the
// machine has, chosen at load time; every variant gives the same bits.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>

namespace nixl::core::ep {

void copy_row(void* to, const void* from, std::int64_t bytes) noexcept;

// One bf16 row [hidden] to E4M3 [hidden] and its scales: `words` gets one fp32 a group, or packed exponent bytes.
void quantize_row(const std::uint16_t* x, std::int64_t hidden, int payload, std::uint8_t* values,
                  std::uint32_t* words) noexcept;

struct WeightedRow {
  const std::uint16_t* row = nullptr;  // bf16 [hidden]
  float weight = 0;
};
// out = sum over rows, in their order, of weight * row; fp32, one rounding. No rows: +0.
void sum_weighted(std::span<const WeightedRow> rows, std::int64_t hidden, std::uint16_t* out) noexcept;
// The same without weights.
void sum_partials(std::span<const std::uint16_t* const> rows, std::int64_t hidden, std::uint16_t* out) noexcept;

}  // namespace nixl::core::ep
