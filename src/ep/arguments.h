// Checks of what callers pass to an operation, the same for every path. A message names the argument, the value seen
// and the values allowed. Paths rely on them.
#pragma once
#include "base/result.h"
#include "ep/path.h"

namespace nixl::core::ep {

// What bounds a call now.
struct Limits {
  Capacity capacity;
  int active_rank_bound = 1;
};

Result<void> check_capacity(const Capacity& wanted, const Capacity& present, int own_rank);
Result<void> check_arguments(const Dispatch& args, const Limits& limits);
Result<void> check_arguments(const CombineArgs& args, const Limits& limits);
// Of a receive phase, which the path compares with its send phase: only what it touches.
Result<void> check_memory(const Dispatch& args);
Result<void> check_memory(const CombineArgs& args);
Result<void> check_combine_buffer(std::int64_t max_tokens, std::int64_t hidden, int num_ranks, const Limits& limits);

}  // namespace nixl::core::ep
