#include "agent/router.h"

namespace nixl::core {
namespace {

using u64 = std::uint64_t;

unsigned long long ll(u64 value) { return value; }

template <typename Entry>
const Resolved<Entry>* side_of(const std::vector<Resolved<Entry>>& sides, const Slot* slot) {
  for (const auto& side : sides)
    if (side.slot == slot) return &side;
  return nullptr;
}

bool fits(const Slot& slot, const PreparedList& local, const PreparedList& remote) {
  const Abilities& can = slot.abilities();
  return can.local_kinds.has(kind_of(local.descs)) && can.remote_kinds.has(kind_of(remote.descs)) &&
         (remote.peer->is_self ? can.local : can.remote);
}

// Numbers the distinct regions of a column in order of first use.
template <typename Entry>
class Table {
 public:
  explicit Table(const Resolved<Entry>& side) : side_(side) {
    if (!side.region.uniform()) places_.assign(side.view->size(), Snapshot<Entry>::kNone);
  }
  std::uint32_t place(std::size_t row) {
    const auto slot = static_cast<std::uint32_t>(side_.region[row]);
    if (side_.region.uniform()) {
      if (used.empty()) used.push_back((*side_.view)[slot]);
      return 0;
    }
    std::uint32_t& place = places_[slot];
    if (place == Snapshot<Entry>::kNone) {
      place = static_cast<std::uint32_t>(used.size());
      used.push_back((*side_.view)[slot]);
    }
    return place;
  }
  std::vector<std::shared_ptr<Entry>> used;

 private:
  const Resolved<Entry>& side_;
  std::vector<std::uint32_t> places_;
};

class Builder {
 public:
  Builder(const PreparedList& local, const PreparedList& remote, const Route& route, std::size_t rows)
      : ours_(*route.local), theirs_(*route.remote) {
    Plan& plan = built_.plan;
    plan.local_kind = kind_of(local.descs);
    plan.remote_kind = kind_of(remote.descs);
    plan.peer = route.remote->link->connection.get();
    for (auto* column : {&plan.local_address, &plan.remote_address, &plan.length}) column->reserve(rows);
    plan.local_region.reserve(rows);
    plan.remote_region.reserve(rows);
  }
  void add(u64 local_address, u64 remote_address, u64 length, std::size_t local_row, std::size_t remote_row) {
    Plan& plan = built_.plan;
    plan.local_address.push_back(local_address);
    plan.remote_address.push_back(remote_address);
    plan.length.push_back(length);
    plan.local_region.push_back(ours_.place(local_row));
    plan.remote_region.push_back(theirs_.place(remote_row));
    plan.total_bytes += length;
  }
  // Joins a block to the last row if it follows it on both sides; false if it does not.
  bool join(u64 local_address, u64 remote_address, u64 length, std::size_t local_row, std::size_t remote_row) {
    Plan& plan = built_.plan;
    if (plan.length.empty() || plan.local_address.back() + plan.length.back() != local_address ||
        plan.remote_address.back() + plan.length.back() != remote_address ||
        plan.local_region.back() != ours_.place(local_row) || plan.remote_region.back() != theirs_.place(remote_row))
      return false;
    plan.length.back() += length;
    plan.total_bytes += length;
    return true;
  }
  BuiltPlan take() {
    Plan& plan = built_.plan;
    plan.num_blocks = plan.num_rows();
    built_.ours = std::move(ours_.used);
    built_.theirs = std::move(theirs_.used);
    for (const auto& entry : built_.ours) plan.local_regions.push_back(entry->object.get());
    for (const auto& entry : built_.theirs) plan.remote_regions.push_back(entry->object.get());
    return std::move(built_);
  }

 private:
  BuiltPlan built_;
  Table<LocalEntry> ours_;
  Table<RemoteEntry> theirs_;
};

tl::unexpected<Error> length_mismatch(std::size_t k, u64 local, u64 remote) {
  return fail(Code::kInvalidArgument, "pair %zu: %llu bytes on the local side, %llu on the remote side", k, ll(local),
              ll(remote));
}

Result<BuiltPlan> split(const PreparedList& local, const PreparedList& remote, const Route& route) {
  const bool one_is_local = local.num_blocks() == 1;
  const PreparedList& one = one_is_local ? local : remote;
  const PreparedList& many = one_is_local ? remote : local;
  const u64 count = many.num_blocks();
  u64 total = 0;
  for (u64 i = 0; i < count; ++i) total += block_at(many, i).length;
  const Block whole = block_at(one, 0);
  if (one.num_blocks() != 1 || whole.length != total || kind_of(one.descs) == MemKind::kObject)
    return fail(Code::kInvalidArgument,
                "%llu local and %llu remote descriptors: numbers must be equal, or one side a single descriptor (no object) "
                "of the other's total length",
                ll(local.num_blocks()), ll(remote.num_blocks()));
  Builder builder(local, remote, route, count);
  u64 at = whole.address;
  for (u64 i = 0; i < count; ++i) {
    const Block part = block_at(many, i);
    if (one_is_local)
      builder.add(at, part.address, part.length, 0, part.row);
    else
      builder.add(part.address, at, part.length, part.row, 0);
    at += part.length;
  }
  return builder.take();
}

}  // namespace

Result<Route> choose_route(const PreparedList& local, const PreparedList& remote) {
  const Slot* wrong_kinds = nullptr;
  for (const auto& mine : local.ours) {
    Slot* slot = mine.slot;
    if (slot->is_companion) continue;
    const auto* other = side_of(remote.theirs, slot);
    if (!other) continue;
    if (!fits(*slot, local, remote)) {
      wrong_kinds = slot;
      continue;
    }
    if (Slot* companion = slot->companion; companion && fits(*companion, local, remote)) {
      const auto* near = side_of(local.ours, companion);
      const auto* far = side_of(remote.theirs, companion);
      if (near && far) return Route{slot, near, far};
    }
    return Route{slot, &mine, other};
  }
  if (wrong_kinds)
    return fail(Code::kInvalidArgument, "backend %s does not move between local %s and remote %s of agent '%s'",
                wrong_kinds->name().c_str(), name(kind_of(local.descs)), name(kind_of(remote.descs)), remote.peer->name.c_str());
  return fail(Code::kNotFound, "no backend holds both the local %s and the remote %s descriptors of agent '%s'",
              name(kind_of(local.descs)), name(kind_of(remote.descs)), remote.peer->name.c_str());
}

Result<BuiltPlan> build_plan(const PreparedList& local, std::span<const std::int64_t> local_index,
                             const PreparedList& remote, std::span<const std::int64_t> remote_index, const Route& route,
                             bool merge) {
  const std::size_t count = local_index.size();
  if (count == 0 || count != remote_index.size())
    return fail(Code::kInvalidArgument, "%zu local and %zu remote indices: equal numbers above 0 are needed", count,
                remote_index.size());
  const u64 num_local = local.num_blocks(), num_remote = remote.num_blocks();
  Builder builder(local, remote, route, count);
  for (std::size_t k = 0; k < count; ++k) {
    const u64 i = static_cast<u64>(local_index[k]), j = static_cast<u64>(remote_index[k]);
    if (i >= num_local || j >= num_remote)  // negative ones are huge here
      return fail(Code::kInvalidArgument, "indices %lld, %lld at position %zu: lists have %llu local and %llu remote blocks",
                  static_cast<long long>(i), static_cast<long long>(j), k, ll(num_local), ll(num_remote));
    const Block mine = block_at(local, i), other = block_at(remote, j);
    if (mine.length != other.length) return length_mismatch(k, mine.length, other.length);
    const bool follows = merge && k && local_index[k] == local_index[k - 1] + 1 && remote_index[k] == remote_index[k - 1] + 1;
    if (!follows || !builder.join(mine.address, other.address, mine.length, mine.row, other.row))
      builder.add(mine.address, other.address, mine.length, mine.row, other.row);
  }
  return builder.take();
}

Result<BuiltPlan> build_plan(const PreparedList& local, const PreparedList& remote, const Route& route) {
  const u64 count = local.num_blocks();
  if (count != remote.num_blocks()) return split(local, remote, route);
  Builder builder(local, remote, route, count);
  for (u64 k = 0; k < count; ++k) {
    const Block mine = block_at(local, k), other = block_at(remote, k);
    if (mine.length != other.length) return length_mismatch(k, mine.length, other.length);
    builder.add(mine.address, other.address, mine.length, mine.row, other.row);
  }
  return builder.take();
}

}  // namespace nixl::core
