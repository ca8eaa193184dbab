#include "agent/lists.h"

#include <algorithm>
#include <cstdio>

namespace nixl::core {
namespace {

std::uint64_t extent(const Descs& descs, std::size_t row) {
  return descs.has_runs() ? descs.stride[row] * (descs.count[row] - 1) + descs.len[row] : descs.len[row];
}

Result<void> check_runs(const Descs& descs) {
  for (std::size_t row = 0; row < descs.rows(); ++row) {
    const std::uint64_t count = descs.count[row], stride = descs.stride[row], length = descs.len[row];
    if (count < 1) return fail(Code::kInvalidArgument, "row %zu: count is 0; at least 1 is needed", row);
    if (stride < length && count > 1)
      return fail(Code::kInvalidArgument, "row %zu: stride %llu is below the block length %llu", row,
                  static_cast<unsigned long long>(stride), static_cast<unsigned long long>(length));
    std::uint64_t reach;
    if (__builtin_mul_overflow(stride, count - 1, &reach) || __builtin_add_overflow(reach, length, &reach))
      return fail(Code::kInvalidArgument, "row %zu: stride times count does not fit 64 bits", row);
  }
  return {};
}

// Rows from `row` on that lie in one item of a view, in a tight loop where columns allow it.
std::size_t rows_inside(const Descs& descs, std::size_t row, const RegionItem& item) {
  const std::size_t rows = descs.rows();
  if (!descs.has_runs() && descs.len.uniform() && descs.dev.uniform() && !descs.addr.uniform()) {
    const std::uint64_t length = descs.len[0], size = item.end - item.begin;
    if (descs.dev[0] != item.device || length > size) return row;
    const std::uint64_t* address = descs.addr.data();
    const std::uint64_t begin = item.begin, room = size - length;
    while (row < rows && address[row] - begin <= room) ++row;
    return row;
  }
  while (row < rows && item.holds(descs.dev[row], descs.addr[row], extent(descs, row))) ++row;
  return row;
}

// The region of every row, or the first row without one.
template <typename Entry>
bool resolve(const Descs& descs, const Snapshot<Entry>& view, Column& region, bool& spans, std::size_t& bad_row) {
  const std::size_t rows = descs.rows();
  std::size_t row = 0;
  Column::Values values;
  while (row < rows) {
    std::uint32_t place = view.find(descs.dev[row], descs.addr[row], extent(descs, row));
    if (place == Snapshot<Entry>::kNone) {
      if (!view.spans(descs.dev[row], descs.addr[row], extent(descs, row))) {
        bad_row = row;
        return false;
      }
      place = kSpans;
      spans = true;
    }
    const std::size_t end = place == kSpans ? row + 1 : rows_inside(descs, row, view.item(place));
    if (row == 0 && end == rows) {
      region = Column(rows, place);
      return true;
    }
    values.resize(rows);
    std::fill(values.begin() + static_cast<std::ptrdiff_t>(row), values.begin() + static_cast<std::ptrdiff_t>(end),
              place);
    row = end;
  }
  region = Column(std::move(values));
  return true;
}

// Rows whose run does not lie in one region become one row a block; numbering of blocks stays.
Descs expand(const Descs& descs) {
  Descs out(descs.type);
  for (std::size_t row = 0; row < descs.rows(); ++row)
    for (std::uint64_t block = 0; block < descs.count[row]; ++block)
      out.add(descs.addr[row] + block * descs.stride[row], descs.len[row], descs.dev[row]);
  return out;
}

void number_blocks(PreparedList& list) {
  if (!list.descs.has_runs()) return;
  list.first_block.reserve(list.descs.rows() + 1);
  std::uint64_t at = 0;
  for (std::size_t row = 0; row < list.descs.rows(); ++row) {
    list.first_block.push_back(at);
    at += list.descs.count[row];
  }
  list.first_block.push_back(at);
}

// Fills `sides` from candidates; true if any backend holds every row.
template <typename Entry, typename Candidates>
bool resolve_all(const Descs& descs, const Candidates& candidates, std::vector<Resolved<Entry>>& sides, bool& spans,
                 std::size_t& bad_row) {
  std::size_t furthest = 0;
  for (Resolved<Entry> side : candidates) {
    std::size_t row = 0;
    if (!sides.empty() && side.view->same_places(*sides.back().view)) {
      side.region = sides.back().region;
      sides.push_back(std::move(side));
    } else if (!side.view->empty() && resolve(descs, *side.view, side.region, spans, row)) {
      sides.push_back(std::move(side));
    }
    furthest = std::max(furthest, row);
  }
  bad_row = furthest;
  return !sides.empty();
}

template <typename Entry>
Result<void> finish(PreparedList& list, std::vector<Resolved<Entry>>& sides,
                    const std::vector<Resolved<Entry>>& candidates, const std::string& whose) {
  if (list.descs.rows() == 0) return fail(Code::kNotFound, "the descriptor list is empty");
  if (list.descs.has_runs()) NIXL_TRY(check_runs(list.descs));
  std::size_t bad_row = 0;
  bool found = resolve_all(list.descs, candidates, sides, list.spans, bad_row);
  constexpr std::uint64_t kMostExpanded = 1 << 24;
  if (!found && list.descs.has_runs() && list.descs.blocks() <= kMostExpanded) {
    list.descs = expand(list.descs);
    found = resolve_all(list.descs, candidates, sides, list.spans, bad_row);
  }
  if (!found)
    return fail(Code::kNotFound, "%s is not inside a region registered %s", describe(list.descs, bad_row).c_str(),
                whose.c_str());
  number_blocks(list);
  return {};
}

// Names the backend by which memory of this kind is known to be wrong as the far side, whatever is registered there: it serves the
// kind as the local side only, or this agent only. Nothing when some backend could have it there.
Result<void> check_far_side(MemKind kind, const Peer& peer, const std::vector<Slot*>& allowed) {
  const Slot* local_only = nullptr;
  const Slot* self_only = nullptr;
  for (const Slot* slot : allowed) {
    const Abilities& can = slot->abilities();
    const bool far = can.remote_kinds.has(kind);
    if (far && (peer.is_self ? can.local : can.remote)) return {};
    if (far && can.local) self_only = slot;
    if (!far && can.local_kinds.has(kind) && can.local && peer.is_self) local_only = slot;
  }
  if (self_only)
    return fail(Code::kInvalidArgument, "backend %s moves %s of this agent only, not of agent '%s'",
                self_only->name().c_str(), name(kind), peer.name.c_str());
  if (local_only)
    return fail(Code::kInvalidArgument, "backend %s takes %s as the local side of a transfer only",
                local_only->name().c_str(), name(kind));
  return {};
}

}  // namespace

std::string asked(const std::vector<Slot*>& slots) {
  std::string names;
  for (const Slot* slot : slots)
    if (!slot->is_companion) names += (names.empty() ? "" : ", ") + slot->name();
  return names.empty() ? "(it has no backend)" : "(asked: " + names + ")";
}

std::string describe(const Descs& descs, std::size_t row) {
  char text[160];
  std::snprintf(text, sizeof text, "descriptor %zu (addr 0x%llx, len %llu, dev %llu, %s)", row,
                static_cast<unsigned long long>(descs.addr[row]), static_cast<unsigned long long>(descs.len[row]),
                static_cast<unsigned long long>(descs.dev[row]), name(kind_of(descs)));
  return text;
}

Block block_at(const PreparedList& list, std::uint64_t i) noexcept {
  const Descs& descs = list.descs;
  if (list.first_block.empty()) return {descs.addr[i], descs.len[i], static_cast<std::size_t>(i)};
  std::size_t row = 0;
  if (descs.count.uniform()) {
    row = i / descs.count[0];
  } else {
    const auto after = std::upper_bound(list.first_block.begin(), list.first_block.end(), i);
    row = static_cast<std::size_t>(after - list.first_block.begin()) - 1;
  }
  return {descs.addr[row] + (i - list.first_block[row]) * descs.stride[row], descs.len[row], row};
}

Result<PreparedList> prepare_local(Descs descs, const std::vector<Slot*>& allowed) {
  PreparedList list;
  list.local = true;
  list.descs = std::move(descs);
  list.descs.meta.clear();
  const MemKind kind = kind_of(list.descs);
  std::vector<Resolved<LocalEntry>> candidates;
  for (Slot* slot : allowed)
    if (slot->abilities().registrable().has(kind))
      candidates.push_back({slot, nullptr, slot->regions.snapshot(kind), {}});
  const std::string none = candidates.empty() ? ": no backend takes this kind of memory " + asked(allowed) : "";
  NIXL_TRY(finish(list, list.ours, candidates, "with a backend of this agent" + none));
  return list;
}

Result<PreparedList> prepare_remote(Descs descs, std::shared_ptr<Peer> peer, const std::vector<Slot*>& allowed) {
  PreparedList list;
  list.descs = std::move(descs);
  list.descs.meta.clear();
  const MemKind kind = kind_of(list.descs);
  std::vector<Resolved<RemoteEntry>> candidates;
  for (Slot* slot : allowed)
    if (PeerLink* link = peer->link(*slot); link && link->connection)
      candidates.push_back({slot, link, link->regions.snapshot(kind), {}});
  const std::string none = candidates.empty() ? ": no backend is connected to it " + asked(allowed) : "";
  if (auto found = finish(list, list.theirs, candidates, "by agent '" + peer->name + "' and known here" + none);
      !found) {
    NIXL_TRY(check_far_side(kind, *peer, allowed));
    return fail(std::move(found).error());
  }
  list.peer = std::move(peer);
  return list;
}

}  // namespace nixl::core
