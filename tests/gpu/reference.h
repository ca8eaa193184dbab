// What dispatch and combine must give, by plain loops: inputs come from hashes of (rank, token), so every rank can compute
// every other rank's.
#pragma once
#include <cstdint>
#include <vector>

#include "ep/layout/layout.h"
#include "ep/layout/push.h"
#include "ep/layout/quantize.h"
#include "nixl/ep.h"

namespace gpu_test {

namespace layout = nixl::core::ep;

struct Case {
  const char* name = "";
  int ranks = 4, experts = 8;  // of a rank
  int max_tokens = 128, hidden = 7168, topk = 8;
  int payload = 1;
  int index_bytes = 4;
  bool exact = false;
  bool split = false, weights = false, zero_copy = false;
  int holes = 0;  // of 16 ids this many are negative
  bool duplicates = false;
  int spread = 0;  // experts that ids are drawn from; 0: all
  int few = -1;    // rank that sends only one token; another one sends none when there are more than two
  std::uint32_t seed = 1;

  int rows() const { return ranks * max_tokens; }
  int tokens(int rank) const {
    return rank == few ? 1 : few >= 0 && ranks > 2 && rank == (few + 1) % ranks ? 0 : max_tokens;
  }
};

inline std::uint32_t mix(std::uint32_t a, std::uint32_t b, std::uint32_t c = 0, std::uint32_t d = 0) {
  std::uint32_t h = a * 0x9e3779b1u ^ (b + 0x7f4a7c15u) * 0x85ebca6bu ^ (c + 0x165667b1u) * 0xc2b2ae35u ^
                    (d + 0x27d4eb2fu) * 0x2545f491u;
  h ^= h >> 15;
  h *= 0x2c1b3c6du;
  h ^= h >> 12;
  return h;
}
// A row of values in about [-scale, scale].
inline void make_row(std::uint32_t seed, int hidden, float scale, std::uint16_t* row) {
  std::uint32_t state = seed | 1;
  for (int i = 0; i < hidden; ++i) {
    state = state * 1664525u + 1013904223u;
    row[i] = layout::bf16_from_float((static_cast<int>(state >> 16) - 32768) * (scale / 32768.0f));
  }
}
inline std::vector<std::uint16_t> token_row(const Case& c, int rank, int token) {
  std::vector<std::uint16_t> row(c.hidden);
  const std::uint32_t h = mix(c.seed, rank, token, 1);
  make_row(h, c.hidden, static_cast<float>(1 << (h >> 29)) * 0.3f, row.data());
  return row;
}
inline std::vector<long long> token_ids(const Case& c, int rank, int token) {
  const int all = c.spread ? c.spread : c.ranks * c.experts;
  std::vector<long long> ids;
  for (int k = 0; k < c.topk; ++k) {
    long long id = mix(c.seed, rank, token, 100 + k) % all;
    if (!c.duplicates && c.topk <= all)
      while (std::find(ids.begin(), ids.end(), id) != ids.end()) id = (id + 1) % all;
    ids.push_back(id);
  }
  for (int k = 0; k < c.topk; ++k)
    if (static_cast<int>(mix(c.seed, rank, token, 200 + k) % 16) < c.holes) ids[k] = -1 - k;
  return ids;
}
inline float token_weight(const Case& c, int rank, int token, int place) {
  return (mix(c.seed, rank, token, 300 + place) % 1000) / 1000.0f - 0.3f;
}
inline void expert_row(const Case& c, int expert, int rank, int token, int place, std::uint16_t* row) {
  make_row(mix(c.seed, expert, rank * 65536 + token, 400 + place), c.hidden, 2.0f, row);
}

struct Row {
  int source, token, place;
};
// For every (token, place) of a rank, whether its row is delivered: of one expert at most max_tokens are.
inline std::vector<bool> delivered(const Case& c, int rank) {
  std::vector<bool> all;
  std::vector<int> count(std::size_t(c.ranks) * c.experts, 0);
  for (int token = 0; token < c.tokens(rank); ++token)
    for (long long id : token_ids(c, rank, token)) all.push_back(id >= 0 && count[id]++ < c.max_tokens);
  return all;
}
// Rows of a local expert in their order.
inline std::vector<std::vector<Row>> expected_rows(const Case& c, int rank) {
  std::vector<std::vector<Row>> rows(c.experts);
  for (int source = 0; source < c.ranks; ++source) {
    std::vector<int> count(c.experts, 0);
    for (int token = 0; token < c.tokens(source); ++token) {
      const auto ids = token_ids(c, source, token);
      for (int place = 0; place < c.topk; ++place)
        if (ids[place] >= 0 && ids[place] / c.experts == rank && count[ids[place] % c.experts]++ < c.max_tokens)
          rows[ids[place] % c.experts].push_back({source, token, place});
    }
  }
  return rows;
}

// Bytes that an operation cannot do without: to other ranks (each token once to a rank; its sum once back), and in this rank's own
// memory (experts' rows written by dispatch, read by combine).
struct Traffic {
  double dispatch_link = 0, combine_link = 0, memory = 0;
  double link() const { return dispatch_link + combine_link; }
};
inline Traffic traffic_of(const Case& c, int rank) {
  const double row =
      static_cast<double>(layout::row_bytes(c.payload, c.hidden) + 4 * layout::scale_words(c.payload, c.hidden));
  Traffic sum;
  for (int source = 0; source < c.ranks; ++source)
    for (int token = 0; token < c.tokens(source); ++token) {
      std::vector<bool> reached(c.ranks, false);
      for (long long id : token_ids(c, source, token)) {
        if (id < 0) continue;
        const int owner = static_cast<int>(id) / c.experts;
        reached[owner] = true;
        if (owner == rank) sum.memory += row + 2.0 * c.hidden;
      }
      for (int owner = 0; owner < c.ranks; ++owner) {
        if (!reached[owner] || owner == source) continue;
        if (source == rank) sum.dispatch_link += row;
        if (owner == rank) sum.combine_link += 2.0 * c.hidden;
      }
    }
  return sum;
}

struct Quantized {
  std::vector<std::uint8_t> bytes;
  std::vector<std::uint32_t> scales;
};
inline Quantized quantized(const Case& c, const std::vector<std::uint16_t>& row) {
  Quantized out;
  if (c.payload == layout::kPayloadBf16) {
    out.bytes.resize(2 * row.size());
    std::memcpy(out.bytes.data(), row.data(), out.bytes.size());
    return out;
  }
  std::uint32_t word = 0;
  for (int group = 0; group < c.hidden / 128; ++group) {
    std::uint16_t largest = 0;
    for (int i = 0; i < 128; ++i) largest = layout::larger_magnitude(largest, row[group * 128 + i]);
    const layout::GroupScale scale = layout::group_scale(largest, c.payload != layout::kPayloadFp8);
    for (int i = 0; i < 128; ++i)
      out.bytes.push_back(layout::e4m3_from_float(layout::float_from_bf16(row[group * 128 + i]) * scale.factor));
    if (c.payload != layout::kPayloadFp8Ue8m0) {
      out.scales.push_back(layout::bits_of(scale.stored));
    } else {
      word |= static_cast<std::uint32_t>(scale.biased) << (group % 4 * 8);
      if (group % 4 == 3) {
        out.scales.push_back(word);
        word = 0;
      }
    }
  }
  return out;
}

// The combined row of one of this rank's tokens, leaving out experts of `absent` ranks.
inline std::vector<std::uint16_t> combined(const Case& c, int rank, int token, bool exact,
                                           const std::vector<bool>& absent, const std::vector<bool>& present) {
  const auto ids = token_ids(c, rank, token);
  std::vector<float> total(c.hidden, 0.0f);
  std::vector<std::uint16_t> row(c.hidden);
  for (int holder = 0; holder < (exact ? 1 : c.ranks); ++holder) {
    std::vector<float> sum(c.hidden, 0.0f);
    bool any = false;
    for (int place = 0; place < c.topk; ++place) {
      if (!present[std::size_t(token) * c.topk + place]) continue;
      const int owner = static_cast<int>(ids[place]) / c.experts;
      if ((!exact && owner != holder) || absent[owner]) continue;
      const float weight = token_weight(c, rank, token, place);
      expert_row(c, static_cast<int>(ids[place]), rank, token, place, row.data());
      for (int i = 0; i < c.hidden; ++i) {
        const float product = weight * layout::float_from_bf16(row[i]);
        sum[i] = sum[i] + product;
      }
      any = true;
    }
    if (exact) {
      total = sum;
    } else if (any) {
      for (int i = 0; i < c.hidden; ++i) total[i] = total[i] + layout::float_from_bf16(layout::bf16_from_float(sum[i]));
    }
  }
  for (int i = 0; i < c.hidden; ++i) row[i] = layout::bf16_from_float(total[i]);
  return row;
}

}  // namespace gpu_test
