// The arithmetic that every path shares, against plain restatements of its rules.
#include "ep/layout/layout.h"

#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"
#include "ep/layout/quantize.h"
#include "ep/layout/reduce.h"
#include "ep/layout/route.h"
#include "ep/layout/shape.h"
#include "ep/layout/wire.h"

namespace {

using namespace nixl::core::ep;

static_assert(size_hint_bytes(128, 7168, 256) == 1'908'412'544);
static_assert(size_hint_bytes(256, 7168, 128) == 1'908'410'496);
static_assert(size_hint_bytes(64, 4096, 8) == 17'039'744);
static_assert(allows(size_hint_bytes(128, 7168, 256), 256, 128, 7168));
static_assert(!allows(classic_bytes(128, 7168, 256) - 1, 256, 128, 7168));
static_assert(max_tokens_for(size_hint_bytes(128, 7168, 256), 256, 7168) == 128);
static_assert(make_control_layout().total % 4096 == 0);
static_assert(make_control_layout().header_of(kMaxRanks - 1, 1, 1) + ControlLayout::kHeaderBytes <=
              make_control_layout().total);
static_assert(make_control_layout().inbox_of(kMaxRanks - 1) + ControlLayout::kInboxBytes <=
              make_control_layout().outbox);
static_assert(token_of(make_entry(kMaxTokens, 31)) == kMaxTokens && place_of(make_entry(kMaxTokens, 31)) == 31);
static_assert(range_first(make_range(7, 5)) == 7 && range_count(make_range(7, 5)) == 5);
static_assert(lead_of(-3, 8) == Lead::kSkip && lead_of(7, 8) == Lead::kExpert && lead_of(8, 8) == Lead::kOutside);

TEST(divisors_divide) {
  for (std::uint32_t d = 1; d < 70'000; d = d < 300 ? d + 1 : d * 5 / 4) {
    const Divisor by(d);
    const std::uint64_t end = (1ull << 32) / d;
    for (std::uint64_t n = 0; n < 3000 && n < end; ++n) CHECK_EQ(by.quotient(n), n / d);
    for (std::uint64_t n = end - 1, i = 0; i < 3000 && n > 0; --n, ++i) CHECK_EQ(by.quotient(n), n / d);
    for (std::uint64_t n = d; n < end; n += end / 97 / d * d + d) {
      CHECK_EQ(by.quotient(n), n / d);
      CHECK_EQ(by.quotient(n - 1), (n - 1) / d);
    }
  }
}

TEST(capacity_covers_every_allowed_call) {
  for (std::int64_t experts : {1, 3, 32, 288})
    for (std::int64_t hidden : {8, 128, 520, 7168, 16384})
      for (std::int64_t tokens : {1, 7, 128, 1024}) {
        const std::int64_t bytes = size_hint_bytes(tokens, hidden, experts);
        CHECK(bytes % 128 == 0 && allows(bytes, experts, tokens, hidden));
        CHECK(max_elements(bytes, experts) >= tokens * hidden);
        CHECK(max_tokens_for(bytes, experts, hidden) >= tokens);
        CHECK(allows(bytes, experts, max_tokens_for(bytes, experts, hidden), hidden));
        CHECK(!allows(bytes, experts, max_tokens_for(bytes, experts, hidden) + 1, hidden));
      }
}

// What one dispatch or combine stages fits into one slot's half of the classic size, rows of every expert included.
TEST(stages_are_no_larger_than_the_classic_layout) {
  for (std::int64_t hidden : {128, 2048, 7168})
    for (std::int64_t experts : {8, 256})
      for (std::int64_t tokens : {16, 128}) {
        const std::int64_t half = size_hint_bytes(tokens, hidden, experts) / 2;
        CHECK(make_combine_stage(experts, experts * tokens, hidden, false).total <= half);
        for (int payload = 0; payload < 4; ++payload)
          CHECK(make_dispatch_stage(experts, tokens * 8, tokens, hidden, payload, true).total <= half);
      }
}

// E4M3 as a search for the nearest of its 127 finite magnitudes, ties to the even code.
std::uint8_t e4m3_by_search(float value) {
  if (std::isnan(value)) return 0x7f;
  const double size = std::fmin(std::fabs(static_cast<double>(value)), 448.0);
  int best = 0;
  for (int code = 1; code < 0x7f; ++code) {
    const double distance = std::fabs(size - float_from_e4m3(static_cast<std::uint8_t>(code)));
    const double best_distance = std::fabs(size - float_from_e4m3(static_cast<std::uint8_t>(best)));
    if (distance < best_distance || (distance == best_distance && code % 2 == 0)) best = code;
  }
  return static_cast<std::uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

TEST(e4m3_decodes_by_its_definition) {
  for (int code = 0; code < 0x7f; ++code) {
    const int exponent = code >> 3;
    const double expected = exponent == 0 ? std::ldexp(code & 7, -9) : std::ldexp(8 + (code & 7), exponent - 10);
    CHECK_EQ(static_cast<double>(float_from_e4m3(static_cast<std::uint8_t>(code))), expected);
    CHECK_EQ(static_cast<double>(float_from_e4m3(static_cast<std::uint8_t>(code | 0x80))), -expected);
  }
  CHECK(std::isnan(float_from_e4m3(0x7f)) && std::isnan(float_from_e4m3(0xff)));
}

TEST(e4m3_rounds_to_the_nearest) {
  for (std::uint32_t high = 0; high < 0x10000; ++high) {  // all of bfloat16
    const float value = float_from_bf16(static_cast<std::uint16_t>(high));
    CHECK_EQ(int{e4m3_from_float(value)}, int{e4m3_by_search(value)});
  }
  for (int code = 0; code < 0x7e; ++code) {  // around every tie
    const float tie =
        (float_from_e4m3(static_cast<std::uint8_t>(code)) + float_from_e4m3(static_cast<std::uint8_t>(code + 1))) / 2;
    for (float value : {std::nextafter(tie, 0.0f), tie, std::nextafter(tie, 1e9f), -tie})
      CHECK_EQ(int{e4m3_from_float(value)}, int{e4m3_by_search(value)});
  }
  CHECK_EQ(int{e4m3_from_float(std::numeric_limits<float>::infinity())}, 0x7e);
  CHECK_EQ(int{e4m3_from_float(-1e30f)}, 0xfe);
}

TEST(bf16_rounds_ties_to_even) {
  for (std::uint32_t high = 0; high < 0x7f80; ++high) {  // finite magnitudes
    const float low = float_from_bf16(static_cast<std::uint16_t>(high));
    CHECK_EQ(bf16_from_float(low), high);
    const float tie = float_from_bits(high << 16 | 0x8000);
    CHECK_EQ(bf16_from_float(tie), high + (high & 1));
    CHECK_EQ(bf16_from_float(float_from_bits(high << 16 | 0x7fff)), high);
    CHECK_EQ(bf16_from_float(float_from_bits(high << 16 | 0x8001)), high + 1);
  }
  CHECK(std::isnan(float_from_bf16(bf16_from_float(float_from_bits(0x7f800001)))));
  CHECK(std::isnan(float_from_bf16(bf16_from_float(float_from_bits(0xffffffff)))));
}

TEST(scales_follow_their_formulae) {
  for (std::uint32_t magnitude = 0; magnitude < 0x7f80; ++magnitude) {
    const float amax = std::fmax(1e-4f, float_from_bf16(static_cast<std::uint16_t>(magnitude)));
    const GroupScale plain = group_scale(static_cast<std::uint16_t>(magnitude), false);
    CHECK_EQ(plain.stored, amax * (1.0f / 448.0f));
    CHECK_EQ(plain.factor, 448.0f / amax);
    const GroupScale rounded = group_scale(static_cast<std::uint16_t>(magnitude), true);
    int exponent = 0;  // 2^exponent is the smallest power of two not below amax / 448
    const float fraction = std::frexp(amax / 448.0f, &exponent);
    if (fraction == 0.5f) --exponent;
    CHECK_EQ(rounded.stored, std::ldexp(1.0f, exponent));
    CHECK_EQ(rounded.factor, std::ldexp(1.0f, -exponent));
    CHECK_EQ(int{rounded.biased}, exponent + 127);
  }
  const GroupScale infinite = group_scale(0x7f80, true);
  CHECK(std::isinf(infinite.stored) && infinite.factor == std::ldexp(1.0f, -128) && infinite.biased == 255);
  CHECK_EQ(larger_magnitude(5, 0x7fc0), 5);  // NaN
  CHECK_EQ(larger_magnitude(5, 0x8006), 6);
}

TEST(sums_round_after_every_step) {
  const std::uint16_t third = bf16_from_float(1.0f / 3);
  volatile float product = 0.1f * float_from_bf16(third);  // volatile: rounded to float before it is added
  CHECK_EQ(add_weighted(1.0f, 0.1f, third), 1.0f + product);
  CHECK_EQ(bits_of(add_weighted(0.0f, -1.0f, 0)), 0u);  // +0 + -0
}

constexpr std::uint32_t kPeer = 77;
FlagWord word(std::uint32_t count) {
  return make_flag(kPeer, count);
}

TEST(a_pair_counts_in_step) {
  PairState pair;
  pair.connect(kPeer);
  FlagWord slots[2] = {0, 0};
  for (std::uint32_t n = 1; n < 6; ++n) {
    CHECK(judge(pair, slots[flag_slot(n)]) == Verdict::kWait);
    slots[flag_slot(n)] = word(n);
    CHECK(judge(pair, slots[flag_slot(n)]) == Verdict::kAccept);
    pair.pass();
  }
  CHECK(judge(pair, word(8)) == Verdict::kMismatch);              // two ahead
  CHECK(judge(pair, make_flag(kPeer + 1, 6)) == Verdict::kWait);  // somebody else's word is inert
}

TEST(unmask_takes_the_newest_count) {
  PairState pair;
  pair.connect(kPeer);
  pair.expected = 6;
  pair.sent = 4;
  const std::uint32_t newest = newest_count(word(8), word(7), kPeer);
  pair.unmask({newest, 5, false});  // 8 awaits our fifth, but was taken back
  CHECK(judge(pair, word(9)) == Verdict::kAccept);
  pair.unmask({newest, 4, true});  // the peer went on to 8 while it was masked here
  CHECK(judge(pair, word(8)) == Verdict::kWait);
  CHECK(judge(pair, word(9)) == Verdict::kAccept);
  pair.unmask({newest, 5, true});  // 8 is its part of the operation to come
  CHECK(judge(pair, word(8)) == Verdict::kAccept);
  pair.unmask({newest_count(0, make_flag(kPeer + 1, 5), kPeer), 5, true});  // nothing from this incarnation yet
  CHECK(judge(pair, word(1)) == Verdict::kAccept);
}

TEST(counts_wrap_around) {
  PairState pair;
  pair.connect(kPeer);
  pair.expected = 0xffffffff;
  CHECK(judge(pair, word(0xffffffff)) == Verdict::kAccept);
  pair.pass();
  CHECK_EQ(pair.expected, 0u);
  CHECK(judge(pair, word(0xfffffffe)) == Verdict::kWait);
  CHECK(judge(pair, word(0)) == Verdict::kAccept);
  CHECK_EQ(newest_count(word(0xffffffff), word(0), kPeer), 0u);
}

}  // namespace

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
