// Where an expert id leads, and in what order the rows of one expert come.
//
// Order of rows of a local expert: ascending source rank, then token, then place in the token's top-k (an id that
// occurs twice in a row of the top-k gives two rows). Of one source at most M rows of one expert are delivered, the
// first ones.
#pragma once
#include <cstdint>

#include "ep/layout/shape.h"

namespace nixl::core::ep {

enum class Lead : int {
  kSkip,     // negative id: nothing is sent
  kExpert,   // an expert of the call
  kOutside,  // id >= R * L: dropped, and reported as an input error
};
NIXL_HD constexpr Lead lead_of(std::int64_t id, std::int64_t experts_in_call) {
  return id < 0 ? Lead::kSkip : id < experts_in_call ? Lead::kExpert : Lead::kOutside;
}

// One (token, place in the top-k) of a source, in 32 bits. Comparing entries compares token, then place.
using Entry = std::uint32_t;
NIXL_HD constexpr Entry make_entry(std::int64_t token, int place) {
  return static_cast<Entry>(token) << 5 | static_cast<Entry>(place);
}
NIXL_HD constexpr std::int32_t token_of(Entry entry) {
  return static_cast<std::int32_t>(entry >> 5);
}
NIXL_HD constexpr int place_of(Entry entry) {
  return static_cast<int>(entry & 31);
}

// A source's block of rows in a local expert's output: first row in the high word, number of rows in the low one.
NIXL_HD constexpr std::int64_t make_range(std::int64_t first, std::int64_t count) {
  return first << 32 | count;
}
NIXL_HD constexpr std::int32_t range_first(std::int64_t range) {
  return static_cast<std::int32_t>(range >> 32);
}
NIXL_HD constexpr std::int32_t range_count(std::int64_t range) {
  return static_cast<std::int32_t>(range & 0xffffffff);
}

// src_info and layout_range come back from the caller: what a block must satisfy before a row of it is touched.
NIXL_HD constexpr bool range_valid(std::int64_t range, std::int64_t rows, std::int64_t max_tokens) {
  return range_first(range) >= 0 && range_count(range) >= 0 && range_count(range) <= max_tokens &&
         std::int64_t{range_first(range)} + range_count(range) <= rows;
}

}  // namespace nixl::core::ep
