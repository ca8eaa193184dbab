#include "backends/network/imported.h"

namespace nixl::core::network {

ImportedRegion::ImportedRegion(ImportedTable& table, std::uint64_t incarnation, std::uint64_t id)
    : table_(table), incarnation_(incarnation), id_(id) {
  table_.add(*this);
}

void ImportedTable::add(ImportedRegion& region) {
  const std::lock_guard guard(mutex_);
  auto& list = regions_[region.incarnation_];
  region.place_ = list.size();
  list.push_back(&region);
}

void ImportedTable::remove(ImportedRegion& region) {
  const std::lock_guard guard(mutex_);
  const auto found = regions_.find(region.incarnation_);
  auto& list = found->second;
  list[region.place_] = list.back();
  list[region.place_]->place_ = region.place_;
  list.pop_back();
  if (list.empty()) regions_.erase(found);
}

void ImportedTable::revoke(std::uint64_t incarnation, std::uint64_t id) {
  const std::lock_guard guard(mutex_);
  const auto found = regions_.find(incarnation);
  if (found == regions_.end()) return;
  for (ImportedRegion* const region : found->second)
    if (region->id_ == id) region->revoked_.store(true, std::memory_order_relaxed);
}

}  // namespace nixl::core::network
