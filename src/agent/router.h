// Chooses the backend of a transfer, once, when the request is made, and builds the plan it runs.
#pragma once
#include <span>

#include "agent/lists.h"
#include "contract/plan.h"

namespace nixl::core {

struct Route {
  Slot* asked = nullptr;  // the backend in creation order that qualifies on both sides: what users are told
  const Resolved<LocalEntry>* local = nullptr;  // of the backend that runs it: `asked` or its companion
  const Resolved<RemoteEntry>* remote = nullptr;
  Slot* slot() const noexcept { return local->slot; }
};

// kNotFound when no backend holds both sides; kInvalidArgument when one does but does not move these kinds.
Result<Route> choose_route(const PreparedList& local, const PreparedList& remote);

struct BuiltPlan {
  Plan plan;
  std::vector<std::shared_ptr<LocalEntry>> ours;
  std::vector<std::shared_ptr<RemoteEntry>> theirs;
  std::uint64_t num_descs = 0;  // as users count: what merged is one, what was cut at region borders is one
};

// Pair k is block local_index[k] with block remote_index[k]. Neighbours in both index lists that touch in memory merge when
// `merge`. kInvalidArgument: empty, unequal or out-of-range indices, lengths that differ.
Result<BuiltPlan> build_plan(const PreparedList& local, std::span<const std::int64_t> local_index,
                             const PreparedList& remote, std::span<const std::int64_t> remote_index, const Route& route,
                             bool merge);
// Row k with row k; or, when one side is a single descriptor of the other's total length and no object, cut in order.
Result<BuiltPlan> build_plan(const PreparedList& local, const PreparedList& remote, const Route& route);

}  // namespace nixl::core
