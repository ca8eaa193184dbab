#include "check.h"
#include "contract/backend.h"
#include "contract/entry.h"
#include "contract/memory.h"
#include "contract/plan.h"
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

int main(int argc, char** argv) { return check::run_tests(argc, argv); }
