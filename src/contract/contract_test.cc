#include "check.h"
#include "contract/backend.h"
#include "contract/entry.h"
#include "contract/memory.h"
#include "contract/plan.h"
#include "contract/plan_cursor.h"
#include "contract/store.h"

using namespace nixl::core;

TEST(kind_sets) {
  constexpr KindSet kinds{MemKind::kDram, MemKind::kFile};
  static_assert(kinds.has(MemKind::kFile) && !kinds.has(MemKind::kVram) && KindSet().empty());
  CHECK((kinds | KindSet{MemKind::kVram}).has(MemKind::kVram));
  CHECK_EQ(std::string(name(MemKind::kBlock)), "BLK_SEG");
  CHECK(is_storage(MemKind::kObject) && !is_storage(MemKind::kVram));
}

TEST(plan_without_runs_has_no_run_columns) {
  Plan plan;
  plan.length = {1, 2};
  CHECK_EQ(plan.num_rows(), 2u);
  CHECK(!plan.has_runs());
}

static Plan scattered() {
  Plan plan;
  plan.local_address = {100, 110, 200, 300};
  plan.remote_address = {1100, 1110, 1300, 1400};
  plan.length = {10, 10, 5, 0};
  plan.local_region = plan.remote_region = {0, 0, 0, 0};
  return plan;
}

TEST(neighbours_merge_only_when_both_sides_continue) {
  Plan plan = scattered();
  merge_neighbours(plan);
  CHECK_EQ(plan.num_rows(), 3u);
  CHECK_EQ(plan.length[0], 20u);
  Plan apart = scattered();
  apart.remote_region[1] = 1;
  merge_neighbours(apart);
  CHECK_EQ(apart.num_rows(), 4u);
}

TEST(cursor_cuts_pieces_and_skips_empty_ones) {
  const Plan plan = scattered();
  PlanCursor cursor(plan);
  std::uint64_t total = 0, pieces = 0;
  while (!cursor.at_end()) {
    const Piece piece = cursor.next(8);
    CHECK(piece.length > 0 && piece.length <= 8);
    CHECK_EQ(piece.remote, total < 20 ? 1100 + total : 1300 + (total - 20));
    total += piece.length;
    ++pieces;
  }
  CHECK_EQ(total, 25u);
  CHECK_EQ(pieces, 5u);
}

TEST(cursor_walks_strided_runs_and_dense_runs_collapse) {
  Plan plan = scattered();
  plan.count = {3, 2, 1, 1};
  plan.local_stride = {50, 10, 5, 1};
  plan.remote_stride = {10, 10, 5, 1};
  merge_neighbours(plan);
  CHECK_EQ(plan.length[1], 20u);
  CHECK_EQ(plan.count[1], 1u);
  PlanCursor cursor(plan);
  CHECK_EQ(cursor.next(1000).local, 100u);
  const Piece second = cursor.next(1000);
  CHECK_EQ(second.local, 150u);
  CHECK_EQ(second.remote, 1110u);
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
