// The vectorised loops against one value at a time, over every bfloat16.
#include "ep/cpu/rows.h"

#include <cstring>
#include <vector>

#include "check.h"
#include "ep/layout/layout.h"
#include "ep/layout/quantize.h"
#include "ep/layout/reduce.h"

namespace {

using namespace nixl::core::ep;

bool same_e4m3(std::uint8_t a, std::uint8_t b) {
  return a == b || ((a & 0x7f) == 0x7f && (b & 0x7f) == 0x7f);
}

TEST(every_bfloat16_quantises_alike) {
  constexpr std::int64_t kHidden = 512;
  std::vector<std::uint16_t> x(kHidden);
  std::vector<std::uint8_t> values(kHidden);
  for (std::uint32_t first = 0; first < 0x10000; first += kGroup) {
    for (int mixed = 0; mixed < 2; ++mixed) {
      // A group of neighbours, and groups where one value sets the scale of very different others.
      for (std::int64_t i = 0; i < kHidden; ++i)
        x[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(
            mixed ? (first + static_cast<std::uint32_t>(i) * 7919) : first + static_cast<std::uint32_t>(i % kGroup));
      for (int payload : {kPayloadFp8, kPayloadFp8Pow2, kPayloadFp8Ue8m0}) {
        std::uint32_t words[kHidden / kGroup] = {};
        quantize_row(x.data(), kHidden, payload, values.data(), words);
        for (std::int64_t group = 0; group < kHidden / kGroup; ++group) {
          std::uint16_t magnitude = 0;
          for (std::int64_t i = 0; i < kGroup; ++i)
            magnitude = larger_magnitude(magnitude, x[static_cast<std::size_t>(group * kGroup + i)]);
          const GroupScale scale = group_scale(magnitude, payload != kPayloadFp8);
          if (payload == kPayloadFp8Ue8m0)
            CHECK_EQ((words[0] >> (8 * group)) & 0xff, std::uint32_t{scale.biased});
          else
            CHECK_EQ(words[group], bits_of(scale.stored));
          for (std::int64_t i = 0; i < kGroup; ++i) {
            const auto at = static_cast<std::size_t>(group * kGroup + i);
            CHECK(same_e4m3(values[at], e4m3_from_float(float_from_bf16(x[at]) * scale.factor)));
          }
        }
      }
    }
  }
}

std::uint16_t canonical(std::uint16_t bits) {
  return (bits & 0x7fff) > 0x7f80 ? 0x7fc0 : bits;
}

TEST(sums_agree_with_one_value_at_a_time) {
  std::uint32_t state = 12345;
  const auto random = [&] { return state = state * 1664525 + 1013904223; };
  for (std::int64_t hidden : {8, 64, 72, 128, 520, 7168}) {
    for (std::size_t count : {0, 1, 2, 8, 32}) {
      std::vector<std::vector<std::uint16_t>> rows(count, std::vector<std::uint16_t>(static_cast<std::size_t>(hidden)));
      std::vector<WeightedRow> weighted;
      std::vector<const std::uint16_t*> plain;
      for (auto& row : rows) {
        for (auto& value : row) value = static_cast<std::uint16_t>(random() >> 16);  // NaN and infinities among them
        weighted.push_back({row.data(), static_cast<float>(random() >> 8) / (1 << 23) - 1});
        plain.push_back(row.data());
      }
      std::vector<std::uint16_t> out(static_cast<std::size_t>(hidden)), out_plain(out);
      sum_weighted(weighted, hidden, out.data());
      sum_partials(plain, hidden, out_plain.data());
      for (std::size_t i = 0; i < out.size(); ++i) {
        float sum = 0, sum_plain = 0;
        for (std::size_t r = 0; r < count; ++r) {
          sum = add_weighted(sum, weighted[r].weight, rows[r][i]);
          sum_plain = add_partial(sum_plain, rows[r][i]);
        }
        CHECK_EQ(canonical(out[i]), canonical(bf16_from_float(sum)));
        CHECK_EQ(canonical(out_plain[i]), canonical(bf16_from_float(sum_plain)));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
