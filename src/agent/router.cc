#include "agent/router.h"

#include <algorithm>

namespace nixl::core {
namespace {

using u64 = std::uint64_t;

unsigned long long ll(u64 value) {
  return value;
}

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
    if (side.region.uniform() && side.region[0] != kSpans)
      used.push_back((*side.view)[static_cast<std::uint32_t>(side.region[0])]);
    else
      places_.assign(side.view->size(), Snapshot<Entry>::kNone);
  }
  std::uint32_t place(std::size_t row) {
    if (places_.empty()) return 0;
    return number(static_cast<std::uint32_t>(side_.region[row]));
  }
  // Number and end of the region for the bytes from `address` on, of any row; rows that span regions are read piece by
  // piece.
  std::pair<std::uint32_t, u64> place_at(const Descs& descs, std::size_t row, u64 address) {
    const auto held = static_cast<std::uint32_t>(side_.region[row]);
    if (held != kSpans) return {place(row), UINT64_MAX};
    const std::uint32_t slot = side_.view->furthest(descs.dev[row], address);
    return {number(slot), side_.view->item(slot).end};
  }
  std::vector<std::shared_ptr<Entry>> used;

 private:
  std::uint32_t number(std::uint32_t slot) {
    std::uint32_t& place = places_[slot];
    if (place == Snapshot<Entry>::kNone) {
      place = static_cast<std::uint32_t>(used.size());
      used.push_back((*side_.view)[slot]);
    }
    return place;
  }
  const Resolved<Entry>& side_;
  std::vector<std::uint32_t> places_;
};

// Blocks by number; lists without runs are read straight from their columns.
class Blocks {
 public:
  explicit Blocks(const PreparedList& list)
      : list_(list),
        plain_(list.first_block.empty()),
        addresses_(list.descs.addr.data()),
        lengths_(list.descs.len.data()),
        address_(list.descs.addr[0]),
        length_(list.descs.len[0]) {}
  Block operator[](u64 i) const noexcept {
    if (!plain_) return block_at(list_, i);
    return {addresses_ ? addresses_[i] : address_, lengths_ ? lengths_[i] : length_, static_cast<std::size_t>(i)};
  }

 private:
  const PreparedList& list_;
  const bool plain_;
  const u64 *addresses_, *lengths_;
  const u64 address_, length_;
};

// Plain rows of one length, all in one region: what most long lists are.
template <typename Entry>
bool is_flat(const PreparedList& list, const Resolved<Entry>& side) {
  return list.first_block.empty() && list.descs.len.uniform() && !list.descs.addr.uniform() && side.region.uniform() &&
         side.region[0] != kSpans;
}

tl::unexpected<Error> bad_index(std::size_t k, std::int64_t i, std::int64_t j, u64 num_local, u64 num_remote) {
  return fail(Code::kInvalidArgument,
              "indices %lld, %lld at position %zu: lists have %llu local and %llu remote blocks",
              static_cast<long long>(i), static_cast<long long>(j), k, ll(num_local), ll(num_remote));
}

class Builder {
 public:
  Builder(const PreparedList& local, const PreparedList& remote, const Route& route, std::size_t rows)
      : local_(local.descs),
        remote_(remote.descs),
        spans_(local.spans || remote.spans),
        ours_(*route.local),
        theirs_(*route.remote) {
    Plan& plan = built_.plan;
    plan.local_kind = kind_of(local.descs);
    plan.remote_kind = kind_of(remote.descs);
    plan.peer = route.remote->link->connection.get();
    for (auto* column : {&plan.local_address, &plan.remote_address, &plan.length}) column->resize(rows);
    plan.local_region.resize(rows);
    plan.remote_region.resize(rows);
  }
  void add(const Block& mine, u64 other_address, std::size_t other_row) {
    ++built_.num_descs;
    if (spans_) return cut(mine, other_address, other_row);
    put(mine.address, other_address, mine.length, ours_.place(mine.row), theirs_.place(other_row));
  }
  // Joins a block to the last row if it follows it on both sides; false if it does not.
  bool join(const Block& mine, const Block& other) {
    Plan& plan = built_.plan;
    if (rows_ == 0 || spans_) return false;
    const std::size_t last = rows_ - 1;
    const u64 length = plan.length[last];
    if (plan.local_address[last] + length != mine.address || plan.remote_address[last] + length != other.address ||
        plan.local_region[last] != ours_.place(mine.row) || plan.remote_region[last] != theirs_.place(other.row))
      return false;
    plan.length[last] += mine.length;
    plan.total_bytes += mine.length;
    return true;
  }
  // All pairs at once, for two flat lists of one length.
  Result<void> add_flat(const Descs& local, std::span<const std::int64_t> local_index, const Descs& remote,
                        std::span<const std::int64_t> remote_index, bool merge) {
    Plan& plan = built_.plan;
    const u64 *const from = local.addr.data(), *const to = remote.addr.data();
    const u64 length = local.len[0], num_local = local.rows(), num_remote = remote.rows();
    u64 *const address = plan.local_address.data(), *const other = plan.remote_address.data(),
               *const lengths = plan.length.data();
    std::size_t rows = 0;
    u64 last_i = 0, last_j = 0;
    for (std::size_t k = 0; k < local_index.size(); ++k) {
      const u64 i = static_cast<u64>(local_index[k]), j = static_cast<u64>(remote_index[k]);
      if (i >= num_local || j >= num_remote)
        return bad_index(k, local_index[k], remote_index[k], num_local, num_remote);
      const u64 here = from[i], there = to[j];
      const bool follows = merge && k && i == last_i + 1 && j == last_j + 1;
      last_i = i;
      last_j = j;
      if (follows && address[rows - 1] + lengths[rows - 1] == here && other[rows - 1] + lengths[rows - 1] == there) {
        lengths[rows - 1] += length;
        continue;
      }
      address[rows] = here;
      other[rows] = there;
      lengths[rows++] = length;
    }
    rows_ = built_.num_descs = rows;
    plan.total_bytes = length * local_index.size();
    std::fill_n(plan.local_region.begin(), rows, 0);
    std::fill_n(plan.remote_region.begin(), rows, 0);
    return {};
  }
  BuiltPlan take() {
    Plan& plan = built_.plan;
    for (auto* column : {&plan.local_address, &plan.remote_address, &plan.length}) column->resize(rows_);
    plan.local_region.resize(rows_);
    plan.remote_region.resize(rows_);
    plan.num_blocks = rows_;
    built_.ours = std::move(ours_.used);
    built_.theirs = std::move(theirs_.used);
    for (const auto& entry : built_.ours) plan.local_regions.push_back(entry->object.get());
    for (const auto& entry : built_.theirs) plan.remote_regions.push_back(entry->object.get());
    return std::move(built_);
  }

 private:
  void put(u64 address, u64 other_address, u64 length, std::uint32_t region, std::uint32_t other_region) {
    Plan& plan = built_.plan;
    plan.local_address[rows_] = address;
    plan.remote_address[rows_] = other_address;
    plan.length[rows_] = length;
    plan.local_region[rows_] = region;
    plan.remote_region[rows_] = other_region;
    plan.total_bytes += length;
    ++rows_;
  }
  // One row for each stretch that lies in one region on both sides.
  void cut(const Block& mine, u64 other_address, std::size_t other_row) {
    Plan& plan = built_.plan;
    u64 done = 0;
    do {
      const auto [region, end] = ours_.place_at(local_, mine.row, mine.address + done);
      const auto [other_region, other_end] = theirs_.place_at(remote_, other_row, other_address + done);
      const u64 length =
          std::min({mine.length - done, end - (mine.address + done), other_end - (other_address + done)});
      if (rows_ == plan.length.size()) {
        for (auto* column : {&plan.local_address, &plan.remote_address, &plan.length}) column->resize(2 * rows_ + 1);
        for (auto* column : {&plan.local_region, &plan.remote_region}) column->resize(2 * rows_ + 1);
      }
      put(mine.address + done, other_address + done, length, region, other_region);
      done += length;
    } while (done < mine.length);
  }

  BuiltPlan built_;
  const Descs &local_, &remote_;
  const bool spans_;
  std::size_t rows_ = 0;
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
    return fail(
        Code::kInvalidArgument,
        "%llu local and %llu remote descriptors: numbers must be equal, or one side a single descriptor (no object) "
        "of the other's total length",
        ll(local.num_blocks()), ll(remote.num_blocks()));
  Builder builder(local, remote, route, count);
  u64 at = whole.address;
  for (u64 i = 0; i < count; ++i) {
    const Block part = block_at(many, i);
    if (one_is_local)
      builder.add({at, part.length, 0}, part.address, part.row);
    else
      builder.add(part, at, 0);
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
                wrong_kinds->name().c_str(), name(kind_of(local.descs)), name(kind_of(remote.descs)),
                remote.peer->name.c_str());
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
  if (is_flat(local, *route.local) && is_flat(remote, *route.remote) && local.descs.len[0] == remote.descs.len[0]) {
    NIXL_TRY(builder.add_flat(local.descs, local_index, remote.descs, remote_index, merge));
    return builder.take();
  }
  const Blocks ours(local), theirs(remote);
  for (std::size_t k = 0; k < count; ++k) {
    const u64 i = static_cast<u64>(local_index[k]), j = static_cast<u64>(remote_index[k]);
    if (i >= num_local || j >= num_remote)  // negative ones are huge here
      return bad_index(k, local_index[k], remote_index[k], num_local, num_remote);
    const Block mine = ours[i], other = theirs[j];
    if (mine.length != other.length) return length_mismatch(k, mine.length, other.length);
    const bool follows =
        merge && k && local_index[k] == local_index[k - 1] + 1 && remote_index[k] == remote_index[k - 1] + 1;
    if (!follows || !builder.join(mine, other)) builder.add(mine, other.address, other.row);
  }
  return builder.take();
}

Result<BuiltPlan> build_plan(const PreparedList& local, const PreparedList& remote, const Route& route) {
  const u64 count = local.num_blocks();
  if (count != remote.num_blocks()) return split(local, remote, route);
  Builder builder(local, remote, route, count);
  const Blocks ours(local), theirs(remote);
  for (u64 k = 0; k < count; ++k) {
    const Block mine = ours[k], other = theirs[k];
    if (mine.length != other.length) return length_mismatch(k, mine.length, other.length);
    builder.add(mine, other.address, other.row);
  }
  return builder.take();
}

}  // namespace nixl::core
