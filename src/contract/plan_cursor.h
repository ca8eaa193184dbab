// Walks a plan as pieces: merge_neighbours() first joins rows that lie side by side, then a PlanCursor yields one
// contiguous copy after the other, cut to a size, without ever expanding runs in memory.
#pragma once
#include <algorithm>
#include <cstdint>

#include "contract/plan.h"

namespace nixl::core {

struct Piece {
  std::uint64_t local = 0, remote = 0, length = 0;
  std::uint32_t local_region = 0, remote_region = 0;  // indices into the plan's tables
};

// Joins a row to the one before it when both sides continue it in the same regions, and turns dense runs (stride equal
// to length on both sides) into single blocks. In place, order kept; num_blocks and total_bytes stay what the caller
// described.
inline void merge_neighbours(Plan& plan) {
  const bool runs = plan.has_runs();
  std::size_t kept = 0;
  for (std::size_t row = 0; row < plan.num_rows(); ++row) {
    std::uint64_t length = plan.length[row], count = runs ? plan.count[row] : 1;
    if (runs && count > 1 && plan.local_stride[row] == length && plan.remote_stride[row] == length) {
      length *= count;
      count = 1;
    }
    if (kept > 0 && count == 1 && (!runs || plan.count[kept - 1] == 1)) {
      const std::size_t last = kept - 1;
      if (plan.local_address[last] + plan.length[last] == plan.local_address[row] &&
          plan.remote_address[last] + plan.length[last] == plan.remote_address[row] &&
          plan.local_region[last] == plan.local_region[row] && plan.remote_region[last] == plan.remote_region[row]) {
        plan.length[last] += length;
        continue;
      }
    }
    plan.local_address[kept] = plan.local_address[row];
    plan.remote_address[kept] = plan.remote_address[row];
    plan.length[kept] = length;
    plan.local_region[kept] = plan.local_region[row];
    plan.remote_region[kept] = plan.remote_region[row];
    if (runs) {
      plan.count[kept] = count;
      plan.local_stride[kept] = plan.local_stride[row];
      plan.remote_stride[kept] = plan.remote_stride[row];
    }
    ++kept;
  }
  for (auto* column : {&plan.local_address, &plan.remote_address, &plan.length}) column->resize(kept);
  for (auto* column : {&plan.local_region, &plan.remote_region}) column->resize(kept);
  if (runs)
    for (auto* column : {&plan.count, &plan.local_stride, &plan.remote_stride}) column->resize(kept);
}

// Position in a plan, which must outlive it unchanged. Empty blocks are skipped.
class PlanCursor {
 public:
  explicit PlanCursor(const Plan& plan) noexcept : plan_(&plan) { settle(); }

  bool at_end() const noexcept { return row_ >= plan_->num_rows(); }
  // The next piece, at most `max_bytes` long (> 0). Call only when not at_end().
  Piece next(std::uint64_t max_bytes) noexcept {
    const bool runs = plan_->has_runs();
    const std::uint64_t local_step = runs ? block_ * plan_->local_stride[row_] : 0;
    const std::uint64_t remote_step = runs ? block_ * plan_->remote_stride[row_] : 0;
    Piece piece{plan_->local_address[row_] + local_step + offset_, plan_->remote_address[row_] + remote_step + offset_,
                std::min(plan_->length[row_] - offset_, max_bytes), plan_->local_region[row_],
                plan_->remote_region[row_]};
    offset_ += piece.length;
    if (offset_ == plan_->length[row_]) {
      offset_ = 0;
      ++block_;
      settle();
    }
    return piece;
  }

 private:
  void settle() noexcept {
    const bool runs = plan_->has_runs();
    while (row_ < plan_->num_rows() && (plan_->length[row_] == 0 || block_ >= (runs ? plan_->count[row_] : 1))) {
      ++row_;
      block_ = 0;
    }
  }

  const Plan* plan_;
  std::size_t row_ = 0;
  std::uint64_t block_ = 0, offset_ = 0;
};

}  // namespace nixl::core
