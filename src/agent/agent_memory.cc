// Agent: registration of memory.
#include <algorithm>
#include <map>

#include "agent/agent.h"
#include "agent/telemetry.h"
#include "agent/trace.h"
#include "base/log.h"

namespace nixl::core {
namespace {

Region region_at(const Descs& descs, std::size_t row) {
  return {kind_of(descs), descs.addr[row], descs.len[row], descs.dev[row], descs.text(row)};
}

// " UCX (DRAM_SEG), POSIX (DRAM_SEG FILE_SEG)"
std::string text_of(const std::vector<Slot*>& slots) {
  std::string text;
  for (const Slot* slot : slots) {
    text += (text.empty() ? " " : ", ") + slot->name() + " (";
    const std::size_t before = text.size();
    for (int kind = 0; kind < kNumMemKinds; ++kind)
      if (slot->abilities().registrable().has(static_cast<MemKind>(kind)))
        text.append(text.size() > before ? " " : "").append(name(static_cast<MemKind>(kind)));
    text += ")";
  }
  return text.empty() ? " none" : text;
}

// A region ends within the 64-bit addresses.
Result<void> check_ends(const Descs& descs) {
  for (std::size_t row = 0; row < descs.rows(); ++row)
    if (descs.addr[row] + descs.len[row] < descs.addr[row])
      return fail(Code::kInvalidArgument, "%s reaches beyond the last 64-bit address", describe(descs, row).c_str());
  return {};
}

}  // namespace

Result<void> Agent::register_one(Slot& slot, const Region& region) {
  if (const auto held = slot.regions.exact(region);
      held && (!is_storage(region.kind) || held->region.meta == region.meta)) {
    ++held->registrations;
    return {};
  }
  auto entry = std::make_shared<LocalEntry>();
  entry->region = region;
  std::shared_ptr<RemoteEntry> target;
  {
    const auto lock = slot.setup();
    NIXL_ASSIGN(entry->object, slot.backend->add_region(region));
    if (slot.abilities().remote) {
      NIXL_ASSIGN(entry->key, slot.backend->export_region(*entry->object));
    }
    PeerLink* self = self_->link(slot);
    if (self && slot.abilities().remote_kinds.has(region.kind)) {
      target = std::make_shared<RemoteEntry>();
      target->region = region;
      target->key = entry->key;
      NIXL_ASSIGN(target->object, slot.backend->loopback_region(*self->connection, region, *entry->object));
    }
  }
  if (const auto held = slot.regions.exact(region)) {  // same place, other text: the backend allowed it
    ++held->registrations;
    return {};
  }
  if (target) {
    entry->usage.acquire();
    target->base = entry;
    self_->link(slot)->regions.put(target);
  }
  const std::lock_guard change(changes_mutex_);
  slot.regions.put(entry);
  ++revision_;
  return {};
}

void Agent::deregister_one(Slot& slot, const Region& region) {
  const auto entry = slot.regions.exact(region);
  if (!entry || --entry->registrations > 0) return;
  {
    const std::lock_guard change(changes_mutex_);
    slot.regions.remove(region);
    ++revision_;
  }
  if (PeerLink* self = self_->link(slot))
    if (const auto target = self->regions.exact(region)) {
      self->regions.remove(region);
      slot.retire(*target);
    }
  slot.retire(*entry);
}

Result<void> Agent::register_in(Slot& slot, const Descs& descs) {
  for (std::size_t row = 0; row < descs.rows(); ++row) {
    if (auto added = register_one(slot, region_at(descs, row)); !added) {
      while (row) deregister_one(slot, region_at(descs, --row));
      return fail(within("backend " + slot.name() + ": " + describe(descs, row), added.error()));
    }
  }
  return {};
}

Result<void> Agent::register_memory(const Descs& descs, BackendIds backends) {
  const TracedCall traced(tracer_, "register_memory");
  NIXL_TRY(check_ends(descs));
  NIXL_ASSIGN(const std::vector<Slot*> candidates, chosen(backends, false));
  const MemKind kind = kind_of(descs);
  std::vector<Slot*> fitting;
  for (Slot* slot : candidates)
    if (slot->abilities().registrable().has(kind)) fitting.push_back(slot);
  if (fitting.empty())
    return fail(Code::kNotFound, "no %sbackend of agent '%s' registers %s here; it has%s",
                backends.empty() ? "" : "named ", name().c_str(), nixl::core::name(kind), text_of(candidates).c_str());
  std::optional<Error> first;
  bool any = false;
  {
    const std::lock_guard lock(registry_mutex_);
    for (Slot* slot : fitting) {
      auto added = register_in(*slot, descs);
      if (!added) {
        if (!first) first = added.error();
        continue;
      }
      any = true;
      Slot* companion = slot->companion;
      if (!companion || !companion->abilities().registrable().has(kind)) continue;
      if (auto beside = register_in(*companion, descs); !beside)
        NIXL_WARN("%s; peers of this host use %s for it", beside.error().reason.c_str(), slot->name().c_str());
    }
  }
  if (!any) {
    if (first->code != Code::kInvalidArgument && first->code != Code::kUnsupported) first->code = Code::kIo;
    return fail(std::move(*first));
  }
  if (telemetry_) {
    std::uint64_t bytes = 0;
    for (std::size_t row = 0; row < descs.rows(); ++row) bytes += descs.len[row];
    telemetry_->memory(Metric::kMemoryRegistered, bytes);
  }
  memory_changed();
  return {};
}

bool Agent::holds_all(Slot& slot, const Descs& descs) const {
  std::map<const LocalEntry*, int> wanted;
  for (std::size_t row = 0; row < descs.rows(); ++row) {
    const auto entry = slot.regions.exact(region_at(descs, row));
    if (!entry || ++wanted[entry.get()] > entry->registrations) return false;
  }
  return true;
}

Result<void> Agent::deregister_memory(const Descs& descs, BackendIds backends) {
  const TracedCall traced(tracer_, "deregister_memory");
  NIXL_ASSIGN(const std::vector<Slot*> candidates, chosen(backends, false));
  {
    const std::lock_guard lock(registry_mutex_);
    std::vector<Slot*> holders;
    for (Slot* slot : candidates)
      if (slot->abilities().registrable().has(kind_of(descs)) && holds_all(*slot, descs)) holders.push_back(slot);
    if (descs.rows() && (holders.empty() || (!backends.empty() && holders.size() < candidates.size())))
      return fail(Code::kNotFound,
                  "not every descriptor of the list (%zu, first %s) is registered as given; nothing was deregistered",
                  descs.rows(), describe(descs, 0).c_str());
    for (Slot* slot : holders)
      for (std::size_t row = 0; row < descs.rows(); ++row) {
        deregister_one(*slot, region_at(descs, row));
        if (slot->companion) deregister_one(*slot->companion, region_at(descs, row));
      }
  }
  if (telemetry_) {
    std::uint64_t bytes = 0;
    for (std::size_t row = 0; row < descs.rows(); ++row) bytes += descs.len[row];
    telemetry_->memory(Metric::kMemoryDeregistered, bytes);
  }
  memory_changed();
  return {};
}

Result<std::vector<std::optional<Params>>> Agent::query_memory(const Descs& descs, std::uint32_t backend) {
  NIXL_TRY(usable());
  Slot* const asked = slot(backend);
  if (!asked)
    return fail(Code::kInvalidArgument, "backend number %u was not created by agent '%s'", backend + 1, name().c_str());
  MemoryQuery* query = asked->backend->memory_query();
  if (!query) return fail(Code::kUnsupported, "backend %s answers no queries about memory", asked->name().c_str());
  std::vector<Region> regions;
  for (std::size_t row = 0; row < descs.rows(); ++row) regions.push_back(region_at(descs, row));
  return query->query(regions);
}

}  // namespace nixl::core
