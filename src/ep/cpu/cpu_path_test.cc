// The protocol with ranks as threads of one process: what they share is visible to the thread sanitizer.
#include <algorithm>
#include <atomic>
#include <chrono>

#include "ep/cpu/test_ranks.h"

namespace {

using namespace nixl::core;
using namespace nixl::core::ep;
using namespace nixl::core::ep::test;

constexpr Nanoseconds kLong = 30'000'000'000;

void run_round(TestRank& rank, std::uint32_t round, const std::vector<int>& present, Combine mode, bool split,
               bool with_weights, bool zero_copy) {
  const Dispatch dispatch = rank.dispatch_args(round, Payload::kBf16, with_weights);
  if (split) {
    CHECK_OK(rank.path->dispatch_send(dispatch));
    CHECK_OK(rank.path->dispatch_recv(dispatch));
  } else {
    CHECK_OK(rank.path->dispatch(dispatch));
  }
  rank.check_dispatch(round, present);
  CombineArgs combine = rank.combine_args(with_weights);
  combine.sends_only = split;
  if (zero_copy) {
    const View view =
        *CHECK_OK(rank.path->next_combine_buffer(rank.shape.max_tokens, rank.shape.hidden, rank.shape.ranks));
    CHECK_EQ(view.stride[1], rank.shape.hidden + rank.shape.hidden / 64);
    for (std::int64_t row = 0; row < rank.shape.experts_per_rank * rank.shape.rows(); ++row)
      std::memcpy(static_cast<std::uint16_t*>(view.data) + row * view.stride[1],
                  rank.out.y.data() + row * rank.shape.hidden, static_cast<std::size_t>(rank.shape.hidden) * 2);
    combine.zero_copy = true;
    combine.x = nullptr;
  }
  if (split) {
    CHECK_OK(rank.path->combine_send(combine));
    CHECK_OK(rank.path->combine_recv(combine));
  } else {
    CHECK_OK(rank.path->combine(combine));
  }
  const bool reduced = mode == Combine::kReduced && (with_weights || !split);
  rank.check_combine(present, reduced ? Combine::kReduced : Combine::kExact);
}

TEST(rounds_in_every_mode) {
  for (Combine mode : {Combine::kExact, Combine::kReduced}) {
    const Shape shape{4, 3, 6, 136, 4};
    auto group = make_group(shape, kLong, mode);
    on_threads(group, [&](TestRank& rank) {
      for (std::uint32_t round = 0; round < 16; ++round)
        run_round(rank, round, all_ranks(shape.ranks), mode, round & 1, round & 2, (round & 4) != 0);
    });
    for (auto& rank : group) {
      CHECK(rank->path->take_faults().empty());
      CHECK_EQ(rank->path->take_input_error(), std::string());
    }
  }
}

TEST(fp8_payloads_carry_their_scales) {
  const Shape shape{3, 2, 5, 512, 3};
  auto group = make_group(shape, kLong);
  for (Payload payload : {Payload::kFp8, Payload::kFp8Pow2, Payload::kFp8Ue8m0}) {
    const auto round = static_cast<std::uint32_t>(payload);
    on_threads(group, [&](TestRank& rank) { CHECK_OK(rank.path->dispatch(rank.dispatch_args(round, payload))); });
    for (auto& rank : group) {
      for (int local = 0; local < shape.experts_per_rank; ++local) {
        for (int source = 0; source < shape.ranks; ++source) {
          const std::int64_t range = rank->out.ranges[static_cast<std::size_t>(local * shape.ranks + source)];
          const Tokens theirs = make_tokens(shape, source, round);
          for (std::int64_t row = range_first(range); row < range_first(range) + range_count(range); ++row) {
            const auto at = static_cast<std::size_t>(local * shape.rows() + row);
            const auto token = static_cast<std::size_t>(rank->out.src_info[at]);
            for (std::int64_t group_index = 0; group_index < shape.hidden / kGroup; ++group_index) {
              std::uint16_t magnitude = 0;
              const std::uint16_t* x = theirs.x.data() + token * 512 + group_index * kGroup;
              for (int i = 0; i < kGroup; ++i) magnitude = larger_magnitude(magnitude, x[i]);
              const GroupScale scale = group_scale(magnitude, payload != Payload::kFp8);
              if (payload == Payload::kFp8Ue8m0) {
                const std::uint32_t word = rank->out.scales[static_cast<std::size_t>(local * shape.rows() + row)];
                CHECK_EQ((word >> (8 * group_index)) & 0xff, std::uint32_t{scale.biased});
              } else {
                const auto column = static_cast<std::size_t>((local * 4 + group_index) * shape.rows() + row);
                CHECK_EQ(rank->out.scales[column], bits_of(scale.stored));
              }
              for (int i = 0; i < kGroup; ++i)
                CHECK_EQ(int{rank->out.x[at * 512 + static_cast<std::size_t>(group_index * kGroup + i)]},
                         int{e4m3_from_float(float_from_bf16(x[i]) * scale.factor)});
            }
          }
        }
      }
    }
  }
}

TEST(one_rank_serves_itself) {
  const Shape shape{1, 4, 8, 64, 3};
  auto group = make_group(shape, 0);
  for (std::uint32_t round = 0; round < 4; ++round)
    run_round(*group[0], round, {0}, Combine::kExact, round & 1, false, (round & 2) != 0);
}

TEST(a_silent_rank_is_masked_and_named) {
  const Shape shape{3, 2, 4, 128, 2};
  auto group = make_group(shape, 400'000'000);
  on_threads(group, [&](TestRank& rank) {
    if (rank.rank == 1) return;
    const Nanoseconds start = now_ns();
    run_round(rank, 5, {0, 2}, Combine::kExact, false, false, false);
    CHECK(now_ns() - start >= 400'000'000);
    const std::vector<Fault> faults = rank.path->take_faults();
    CHECK_EQ(faults.size(), std::size_t{1});
    CHECK_EQ(faults[0].rank, 1);
    CHECK(faults[0].phase == nixl::ep::Phase::kDispatch);
    CHECK_EQ(faults[0].operation, 1u);
    CHECK_EQ(faults[0].expected, make_flag(101, 1));
    CHECK_EQ(faults[0].seen, 0u);
    CHECK_EQ(rank.masks()[1], 1);
    CHECK(rank.path->take_faults().empty());
  });
  // Rank 1 wakes: it finds both messages taken back, ends without waiting, and keeps its own tokens.
  run_round(*group[1], 5, {1}, Combine::kExact, false, false, false);
  const std::vector<Fault> faults = group[1]->path->take_faults();
  CHECK_EQ(faults.size(), std::size_t{2});
  for (const Fault& fault : faults) CHECK_EQ(fault.seen, fault.expected);  // the words were there, the messages not
  // Unmasked everywhere, without a connect and in any order, they are in step again.
  for (std::uint32_t round = 6; round < 10; ++round)
    on_threads(group, [&](TestRank& rank) {
      if (round == 6) rank.unmask(all_ranks(3));
      run_round(rank, round, {0, 1, 2}, Combine::kExact, round & 1, false, false);
    });
  for (auto& rank : group) CHECK(rank->path->take_faults().empty());
}

TEST(ranks_that_counted_differently_meet_again) {
  const Shape shape{2, 1, 4, 128, 1};
  for (int lone = 1; lone <= 4; ++lone) {
    auto group = make_group(shape, 0);  // 0: whoever is not there is masked
    for (int i = 0; i < lone; ++i) {
      run_round(*group[0], 1, {0}, Combine::kExact, false, false, false);
      group[0]->unmask({1});  // sends to it again and again
    }
    group[0]->path->take_faults();
    auto again = make_group(shape, kLong);
    again.swap(group);
    // The same with a long timeout: rank 1 is masked through the API while rank 0 goes on.
    CHECK_OK(group[0]->path->set_mask(std::vector<int>{1}, true, nullptr));
    CHECK_OK(group[1]->path->set_mask(std::vector<int>{0}, true, nullptr));
    for (int i = 0; i < lone; ++i) run_round(*group[0], 1, {0}, Combine::kExact, false, false, false);
    on_threads(group, [&](TestRank& rank) {
      if (rank.rank == 0) std::this_thread::sleep_for(std::chrono::milliseconds(lone % 2 ? 20 : 0));
      rank.unmask({1 - rank.rank});
      for (std::uint32_t round = 0; round < 3; ++round)
        run_round(rank, round, {0, 1}, Combine::kExact, false, false, false);
    });
  }
}

TEST(a_late_joiner_needs_no_parity) {
  const Shape shape{3, 2, 4, 128, 2};
  for (std::uint32_t before = 1; before <= 3; ++before) {
    std::vector<std::unique_ptr<TestRank>> group;
    for (int rank = 0; rank < 3; ++rank)
      group.push_back(
          std::make_unique<TestRank>(shape, rank, kLong, Combine::kExact, 10u + static_cast<std::uint32_t>(rank)));
    attach(*group[0], *group[1]);
    attach(*group[1], *group[0]);
    auto third = std::move(group[2]);
    on_threads(group, [&](TestRank& rank) {
      rank.unmask({0, 1});
      for (std::uint32_t round = 0; round < before; ++round) CHECK_OK(rank.path->dispatch(rank.dispatch_args(round)));
    });
    group[2] = std::move(third);
    for (int old : {0, 1}) {
      attach(*group[static_cast<std::size_t>(old)], *group[2]);
      attach(*group[2], *group[static_cast<std::size_t>(old)]);
    }
    on_threads(group, [&](TestRank& rank) {
      rank.unmask(all_ranks(3));
      for (std::uint32_t round = 0; round < 3; ++round)
        run_round(rank, round, {0, 1, 2}, Combine::kExact, false, false, false);
    });
  }
}

TEST(attach_and_detach_while_operations_run) {
  const Shape shape{3, 2, 4, 128, 2};
  auto group = make_group(shape, kLong);
  auto third = std::move(group[2]);
  for (auto& rank : group)
    if (rank) CHECK_OK(rank->path->detach(2));
  std::atomic<bool> stop{false};
  std::thread other([&] {
    for (std::uint32_t i = 0; i < 60; ++i) {
      TestRank joiner(shape, 2, kLong, Combine::kExact, 500 + i);
      for (int old : {0, 1}) attach(*group[static_cast<std::size_t>(old)], joiner);
      for (int old : {0, 1}) CHECK_OK(group[static_cast<std::size_t>(old)]->path->detach(2));
    }
    stop = true;
  });
  std::atomic<std::uint32_t> last{UINT32_MAX};  // the round after which both stop
  std::atomic<std::uint32_t> reached{0};
  on_threads(group, [&](TestRank& rank) {
    for (std::uint32_t round = 0; round <= last.load(); ++round) {
      if (rank.rank == 0 && stop.load() && last.load() == UINT32_MAX) last = round + 1;
      run_round(rank, round, {0, 1}, Combine::kExact, round & 1, false, false);
      reached = round;
    }
  });
  other.join();
  CHECK(reached.load() > 0);
  for (auto& rank : group)
    if (rank) CHECK(rank->path->take_faults().empty());
}

TEST(a_mask_from_another_thread_ends_a_wait) {
  const Shape shape{2, 1, 2, 128, 1};
  auto group = make_group(shape, kLong);
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    CHECK_OK(group[0]->path->set_mask(std::vector<int>{1}, true, nullptr));
  });
  run_round(*group[0], 3, {0}, Combine::kExact, false, false, false);
  other.join();
  CHECK(group[0]->path->take_faults().empty());
}

TEST(close_ends_a_wait) {
  const Shape shape{2, 1, 2, 128, 1};
  auto group = make_group(shape, kLong);
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    CHECK_OK(group[0]->path->close());
  });
  CHECK_OK(group[0]->path->dispatch(group[0]->dispatch_args(3)));
  other.join();
  CHECK(!group[0]->path->dispatch(group[0]->dispatch_args(4)));
}

TEST(barriers_hold) {
  const Shape shape{3, 1, 2, 128, 1};
  auto group = make_group(shape, kLong);
  std::atomic<int> arrived{0};
  on_threads(group, [&](TestRank& rank) {
    for (int step = 1; step <= 20; ++step) {
      ++arrived;
      CHECK_OK(rank.path->barrier(nullptr));
      CHECK(arrived.load() >= 3 * step);
    }
  });
}

TEST(a_lost_barrier_is_made_up_after_unmasking) {
  const Shape shape{3, 1, 2, 128, 1};
  auto group = make_group(shape, kLong);
  for (int lost = 0; lost < 3; ++lost) {
    CHECK_OK(group[0]->path->set_mask(std::vector<int>{1, 2}, true, nullptr));
    CHECK_OK(group[0]->path->barrier(nullptr));  // alone
    on_threads(group, [&](TestRank& rank) {
      rank.unmask(all_ranks(3));  // in any order, and at once the next barrier
      for (int step = 0; step < 3; ++step) CHECK_OK(rank.path->barrier(nullptr));
      CHECK(rank.path->take_faults().empty());
    });
    auto quick = make_group(shape, 5'000'000);
    CHECK_OK(quick[0]->path->barrier(nullptr));  // the others do not come
    CHECK_EQ(quick[0]->path->take_faults().size(), std::size_t{2});
  }
}

TEST(the_group_grows_between_operations) {
  const Shape small{2, 2, 4, 128, 2};
  const Shape large{3, 2, 4, 128, 2};
  std::vector<std::unique_ptr<TestRank>> group;
  for (int rank = 0; rank < 2; ++rank)
    group.push_back(
        std::make_unique<TestRank>(small, rank, kLong, Combine::kExact, 20u + static_cast<std::uint32_t>(rank)));
  attach(*group[0], *group[1]);
  attach(*group[1], *group[0]);
  on_threads(group, [&](TestRank& rank) {
    rank.unmask({0, 1});
    run_round(rank, 1, {0, 1}, Combine::kExact, false, false, false);
    // Rank 0 grows while rank 1 may still be reading.
    CHECK_OK(rank.path->reserve({3, 2, size_hint_bytes(64, 512, 6)}));
    rank.shape = large;
    run_round(rank, 2, {0, 1}, Combine::kExact, false, false, true);
  });
  group.push_back(std::make_unique<TestRank>(large, 2, kLong, Combine::kExact, 22));
  for (std::size_t old : {0, 1}) {
    attach(*group[old], *group[2]);
    attach(*group[2], *group[old]);
  }
  on_threads(group, [&](TestRank& rank) {
    rank.unmask({0, 1, 2});
    for (std::uint32_t round = 3; round < 6; ++round)
      run_round(rank, round, {0, 1, 2}, Combine::kExact, false, false, round == 4);
  });
}

TEST(what_only_the_path_knows_is_refused_and_changes_nothing) {
  const Shape shape{2, 2, 4, 128, 2};
  auto group = make_group(shape, kLong);
  TestRank& rank = *group[0];
  CHECK(!rank.path->set_mask(std::vector<int>{0}, true, nullptr));  // itself
  CHECK(!rank.path->set_mask(std::vector<int>{1, 7}, false, nullptr));
  CHECK(!rank.path->dispatch_recv(rank.dispatch_args(1)));
  on_threads(group, [&](TestRank& r) { run_round(r, 1, {0, 1}, Combine::kExact, false, false, false); });
  CombineArgs args = rank.combine_args();
  args.zero_copy = true;  // of memory that nobody asked for
  CHECK(!rank.path->combine_send(args));
  args.zero_copy = false;
  rank.out.ranges[0] = make_range(7, 4);
  CHECK(!rank.path->combine_send(args));
  on_threads(group, [&](TestRank& r) { run_round(r, 2, {0, 1}, Combine::kExact, false, false, false); });
}

TEST(ids_outside_and_rows_beyond_the_bound_are_dropped_and_reported) {
  const Shape shape{2, 1, 3, 128, 4};
  auto group = make_group(shape, kLong);
  on_threads(group, [&](TestRank& rank) {
    Dispatch args = rank.dispatch_args(1);
    args.num_tokens = 3;
    rank.tokens.x.assign(3 * 128, bf16_from_float(1));
    rank.tokens.ids = {1, 1, 1, 0, 9, -5, 0, 1, 1, 1, 1, 1};
    args.x = rank.tokens.x.data();
    args.topk_idx = rank.tokens.ids.data();
    CHECK_OK(rank.path->dispatch(args));
    CHECK(rank.path->take_input_error().find("topk_idx[1, 0] is 9") != std::string::npos);
    CHECK_EQ(rank.path->take_input_error(), std::string());
    CHECK_EQ(rank.out.count[0], rank.rank == 0 ? 4 : 6);
    if (rank.rank == 1) CHECK_EQ(rank.out.src_info[2], 0);  // the first three rows, all of token 0
  });
}

TEST(a_forgotten_receive_phase_is_made_up) {
  const Shape shape{2, 1, 3, 128, 1};
  auto group = make_group(shape, kLong);
  on_threads(group, [&](TestRank& rank) {
    const Dispatch args = rank.dispatch_args(1);
    CHECK_OK(rank.path->dispatch_send(args));
    if (rank.rank == 1) CHECK_OK(rank.path->dispatch_recv(args));
    run_round(rank, 2, {0, 1}, Combine::kExact, true, false, false);
    CHECK(!rank.path->dispatch_recv(args));
  });
}

TEST(different_shapes_mask_instead_of_corrupting) {
  const Shape shape{2, 1, 3, 256, 1};
  auto group = make_group(shape, kLong);
  std::atomic<int> explained{0};  // by whoever looked first; the other finds its message taken back
  on_threads(group, [&](TestRank& rank) {
    if (rank.rank == 1) rank.shape.hidden = 128;
    CHECK_OK(rank.path->dispatch(rank.dispatch_args(1)));
    rank.check_dispatch(1, {rank.rank});
    CHECK_EQ(rank.masks()[static_cast<std::size_t>(1 - rank.rank)], 1);
    if (rank.path->take_input_error().find("hidden") != std::string::npos) ++explained;
  });
  CHECK(explained.load() >= 1);
}

}  // namespace

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
