// The order and the rounding of sums in combine.
//
// Exact: the owner of a token starts from +0 and, by ascending place in the top-k, adds weight * row: multiply, round,
// add, round, all in fp32; one rounding to bf16 at the end. Reduced: the rank that holds several rows of a token does
// the same over its own rows and rounds to bf16; the owner starts from +0, adds these partial rows by ascending rank in
// fp32 and rounds once. A token with nothing left is +0.
#pragma once
#include "ep/layout/quantize.h"

namespace nixl::core::ep {

NIXL_HD inline float add_weighted(float sum, float weight, std::uint16_t row_bf16) {
  return add_rn(sum, mul_rn(weight, float_from_bf16(row_bf16)));
}
NIXL_HD inline float add_partial(float sum, std::uint16_t partial_bf16) {
  return add_rn(sum, float_from_bf16(partial_bf16));
}

}  // namespace nixl::core::ep
