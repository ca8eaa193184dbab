// For the tests: ranks of one group with their tensors, and plain loops that say what each must receive.
#pragma once
#include <sys/socket.h>

#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "ep/layout/quantize.h"
#include "ep/layout/reduce.h"
#include "ep/layout/route.h"
#include "ep/layout/shape.h"
#include "ep/layout/wire.h"
#include "ep/path.h"

namespace nixl::core::ep::test {

using nixl::ep::Combine;
using nixl::ep::Payload;

struct Shape {
  int ranks = 2;
  int experts_per_rank = 2;  // L
  std::int64_t max_tokens = 4;
  std::int64_t hidden = 128;
  int topk = 2;
  int all_experts() const { return ranks * experts_per_rank; }
  std::int64_t rows() const { return ranks * max_tokens; }
};

// What one rank sends in one round; made from a seed, so that every rank can make everybody's.
struct Tokens {
  std::int64_t count = 0;
  std::vector<std::uint16_t> x;
  std::vector<std::int64_t> ids;
  std::vector<float> weights;
};
inline std::uint32_t mix(std::uint32_t a, std::uint32_t b) {
  std::uint32_t h = a * 2654435761u ^ (b + 0x9e3779b9u + (a << 6));
  h ^= h >> 15;
  h *= 2246822519u;
  return h ^ (h >> 13);
}
inline Tokens make_tokens(const Shape& shape, int rank, std::uint32_t round) {
  Tokens tokens;
  std::uint32_t state = mix(static_cast<std::uint32_t>(rank) + 1, round + 1);
  const auto next = [&] { return state = mix(state, 77); };
  tokens.count = next() % (static_cast<std::uint32_t>(shape.max_tokens) + 1);
  for (std::int64_t i = 0; i < tokens.count * shape.hidden; ++i)
    tokens.x.push_back(bf16_from_float(static_cast<float>(static_cast<std::int32_t>(next()) >> 16) / 4096));
  for (std::int64_t i = 0; i < tokens.count; ++i) {
    const int first = static_cast<int>(next() % static_cast<std::uint32_t>(shape.all_experts()));
    for (int k = 0; k < shape.topk; ++k) {
      tokens.ids.push_back(next() % 8 == 0 ? -1 : (first + k) % shape.all_experts());
      tokens.weights.push_back(static_cast<float>(next() % 1000) / 1000);
    }
  }
  return tokens;
}

struct Outputs {
  std::vector<std::uint8_t> x;
  std::vector<std::uint32_t> scales;
  std::vector<std::int32_t> count, src_info, stats;
  std::vector<std::int64_t> ranges, cost;
  std::vector<float> weights;
  std::vector<std::uint8_t> places;
  std::vector<std::uint16_t> y, combined;
};

// One rank: its path, its tensors, and the two operations.
class TestRank {
 public:
  TestRank(const Shape& shape, int rank, Nanoseconds timeout_ns, Combine mode = Combine::kExact,
           std::uint32_t incarnation = 1)
      : shape(shape), rank(rank), incarnation(incarnation) {
    PathOptions options;
    options.rank = rank;
    options.timeout_ns = timeout_ns;
    options.incarnation = incarnation;
    options.combine = mode;
    path = std::move(*CHECK_OK(open_cpu_path(options)));
    CHECK_OK(path->reserve(
        {shape.ranks, shape.experts_per_rank, size_hint_bytes(shape.max_tokens, shape.hidden, shape.all_experts())}));
  }

  Dispatch dispatch_args(std::uint32_t round, Payload payload = Payload::kBf16, bool with_weights = false) {
    tokens = make_tokens(shape, rank, round);
    const auto rows = static_cast<std::size_t>(shape.experts_per_rank * shape.rows());
    out.x.assign(rows * static_cast<std::size_t>(shape.hidden) * 2, 0xee);
    out.scales.assign(rows * static_cast<std::size_t>(shape.hidden / kGroup), 0xeeeeeeee);
    out.count.assign(static_cast<std::size_t>(shape.experts_per_rank), -1);
    out.stats.assign(static_cast<std::size_t>(shape.experts_per_rank), 100);
    out.src_info.assign(rows, -7);
    out.ranges.assign(static_cast<std::size_t>(shape.experts_per_rank * shape.ranks), -7);
    out.cost.assign(static_cast<std::size_t>(shape.ranks), 0);
    out.weights.assign(rows, -1);
    out.places.assign(rows, 99);
    Dispatch args;
    args.x = tokens.x.data();
    args.num_tokens = tokens.count;
    args.hidden = shape.hidden;
    args.topk_idx = tokens.ids.data();
    args.topk = shape.topk;
    args.max_tokens = shape.max_tokens;
    args.num_ranks = shape.ranks;
    args.payload = payload;
    args.recv_x = out.x.data();
    args.recv_scales = out.scales.data();
    args.recv_count = out.count.data();
    args.src_info = out.src_info.data();
    args.layout_range = out.ranges.data();
    args.recv_stats = out.stats.data();
    args.wait_cost = out.cost.data();
    if (with_weights) {
      args.topk_weights = tokens.weights.data();
      args.recv_weights = out.weights.data();
      args.recv_places = out.places.data();
    }
    return args;
  }

  // y: every received row scaled by (expert + 2) / 4, so that experts differ.
  CombineArgs combine_args(bool with_weights = false) {
    out.y.assign(static_cast<std::size_t>(shape.experts_per_rank * shape.rows() * shape.hidden),
                 0x7fc0);  // NaN unless set
    const auto* x = reinterpret_cast<const std::uint16_t*>(out.x.data());
    for (int local = 0; local < shape.experts_per_rank; ++local)
      for (std::int64_t i = 0; i < out.count[static_cast<std::size_t>(local)] * shape.hidden; ++i) {
        const auto at = static_cast<std::size_t>(local * shape.rows() * shape.hidden + i);
        out.y[at] = expert_output(x[at], rank * shape.experts_per_rank + local);
      }
    out.combined.assign(static_cast<std::size_t>(tokens.count * shape.hidden), 0xeeee);
    CombineArgs args;
    args.x = out.y.data();
    args.num_tokens = tokens.count;
    args.hidden = shape.hidden;
    args.topk_idx = tokens.ids.data();
    args.topk = shape.topk;
    args.topk_weights = tokens.weights.data();
    args.src_info = out.src_info.data();
    args.layout_range = out.ranges.data();
    args.max_tokens = shape.max_tokens;
    args.num_ranks = shape.ranks;
    args.out = out.combined.data();
    if (with_weights) {
      args.recv_weights = out.weights.data();
      args.recv_places = out.places.data();
    }
    return args;
  }
  static std::uint16_t expert_output(std::uint16_t x, int expert) {
    return bf16_from_float(float_from_bf16(x) * static_cast<float>(expert + 2) / 4);
  }

  // Checks all that a bf16 dispatch of `round` must give when exactly `sources` are heard.
  void check_dispatch(std::uint32_t round, const std::vector<int>& sources) const {
    for (int local = 0; local < shape.experts_per_rank; ++local) {
      const std::int64_t expert = rank * shape.experts_per_rank + local;
      std::int64_t row = 0;
      for (int source = 0; source < shape.ranks; ++source) {
        const std::int64_t first = row;
        const bool heard = std::find(sources.begin(), sources.end(), source) != sources.end();
        const Tokens theirs = make_tokens(shape, source, round);
        for (std::int64_t i = 0; heard && i < theirs.count * shape.topk; ++i) {
          if (theirs.ids[static_cast<std::size_t>(i)] != expert) continue;
          const std::int64_t token = i / shape.topk;
          const auto at = static_cast<std::size_t>(local * shape.rows() + row);
          CHECK_EQ(out.src_info[at], token);
          CHECK(std::memcmp(out.x.data() + at * static_cast<std::size_t>(shape.hidden) * 2,
                            theirs.x.data() + token * shape.hidden, static_cast<std::size_t>(shape.hidden) * 2) == 0);
          ++row;
        }
        const std::int64_t range = out.ranges[static_cast<std::size_t>(local * shape.ranks + source)];
        CHECK_EQ(range_count(range), row - first);
        if (heard) CHECK_EQ(range_first(range), first);
      }
      CHECK_EQ(out.count[static_cast<std::size_t>(local)], row);
      CHECK_EQ(out.stats[static_cast<std::size_t>(local)], row + 100);
    }
  }

  // Checks an operation pair's result: contributions of experts at `holders` only.
  void check_combine(const std::vector<int>& holders, Combine mode) const {
    for (std::int64_t token = 0; token < tokens.count; ++token) {
      for (std::int64_t channel = 0; channel < shape.hidden; ++channel) {
        const std::uint16_t x = tokens.x[static_cast<std::size_t>(token * shape.hidden + channel)];
        float sum = 0;
        for (int holder = 0; holder < (mode == Combine::kReduced ? shape.ranks : 1); ++holder) {
          float partial = 0;
          for (int k = 0; k < shape.topk; ++k) {
            const auto at = static_cast<std::size_t>(token * shape.topk + k);
            if (tokens.ids[at] < 0) continue;
            const int id = static_cast<int>(tokens.ids[at]);
            const int owner = id / shape.experts_per_rank;
            if (mode == Combine::kReduced && owner != holder) continue;
            if (std::find(holders.begin(), holders.end(), owner) == holders.end()) continue;
            partial = add_weighted(partial, tokens.weights[at], expert_output(x, id));
          }
          sum = mode == Combine::kReduced ? add_partial(sum, bf16_from_float(partial)) : partial;
        }
        CHECK_EQ(out.combined[static_cast<std::size_t>(token * shape.hidden + channel)], bf16_from_float(sum));
      }
    }
  }

  void unmask(const std::vector<int>& ranks) { CHECK_OK(path->set_mask(ranks, false, nullptr)); }
  std::vector<int> masks() const {
    std::vector<std::int32_t> words(static_cast<std::size_t>(shape.ranks));
    CHECK_OK(path->query_masks(words.data(), nullptr));
    return {words.begin(), words.end()};
  }

  Shape shape;
  int rank;
  std::uint32_t incarnation;
  std::unique_ptr<Path> path;
  Tokens tokens;
  Outputs out;
};

inline void attach(TestRank& to, TestRank& peer) {
  CHECK_OK(to.path->attach({peer.rank, peer.incarnation}, std::move(*CHECK_OK(peer.path->export_memory()))));
}
inline std::vector<int> all_ranks(int count, int without = -1) {
  std::vector<int> ranks;
  for (int rank = 0; rank < count; ++rank)
    if (rank != without) ranks.push_back(rank);
  return ranks;
}

// All ranks of a group in this process, attached to one another and unmasked.
inline std::vector<std::unique_ptr<TestRank>> make_group(const Shape& shape, Nanoseconds timeout_ns,
                                                         Combine mode = Combine::kExact) {
  std::vector<std::unique_ptr<TestRank>> group;
  for (int rank = 0; rank < shape.ranks; ++rank)
    group.push_back(std::make_unique<TestRank>(shape, rank, timeout_ns, mode, 100u + static_cast<std::uint32_t>(rank)));
  for (auto& a : group)
    for (auto& b : group)
      if (a != b) attach(*a, *b);
  for (auto& a : group) a->unmask(all_ranks(shape.ranks));
  return group;
}

// Runs `body` for each rank on a thread of its own.
inline void on_threads(std::vector<std::unique_ptr<TestRank>>& group, const std::function<void(TestRank&)>& body) {
  std::vector<std::thread> threads;
  for (auto& rank : group)
    if (rank) threads.emplace_back([&] { body(*rank); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace nixl::core::ep::test
