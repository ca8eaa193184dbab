// Registered regions of one backend (ours, or one peer's) and the question "which region holds this descriptor?".
//
// Writers (add, remove) and readers may run at the same time: readers work on an immutable snapshot that is rebuilt when it is
// first needed after a change. Entries live as long as someone holds them; what they hold of the backend dies earlier, by
// `Usage`: when retired and not used by a running transfer.
#pragma once
#include <nixl/descs.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_set>
#include <vector>

#include "contract/backend.h"

namespace nixl::core {

// Counts running users of something that may be retired meanwhile.
class Usage {
 public:
  bool acquire() noexcept {  // false: retired
    std::uint64_t seen = word_.load(std::memory_order_relaxed);
    do {
      if (seen & kRetired) return false;
    } while (!word_.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire, std::memory_order_relaxed));
    return true;
  }
  // Both answer true to exactly one caller: the one who must now destroy.
  bool release() noexcept { return word_.fetch_sub(1, std::memory_order_acq_rel) == (kRetired | 1); }
  bool retire() noexcept { return word_.fetch_or(kRetired, std::memory_order_acq_rel) == 0; }

 private:
  static constexpr std::uint64_t kRetired = 1ull << 63;
  std::atomic<std::uint64_t> word_{0};
};

struct LocalEntry {
  Region region;
  int registrations = 1;  // guarded by the index
  std::unique_ptr<LocalRegion> object;
  std::string key;  // public bytes, remote-capable backends
  Usage usage;
};

struct RemoteEntry {
  Region region;
  std::unique_ptr<RemoteRegion> object;
  std::string key;
  std::uint64_t revision = 0;  // of the newest metadata that held it; guarded by the agent, which loads one at a time
  std::shared_ptr<LocalEntry> base;  // our own region seen as target; used by this entry until its object is destroyed
  Usage usage;
};

inline bool same_place(const Region& a, const Region& b) {
  return a.kind == b.kind && a.address == b.address && a.length == b.length && a.device == b.device;
}

struct RegionItem {
  std::uint64_t device, begin, end;
  std::uint64_t reach;  // largest end of this and all earlier items of the device
  bool holds(std::uint64_t on, std::uint64_t address, std::uint64_t length) const noexcept {
    return device == on && begin <= address && length <= end - begin && address - begin <= end - begin - length;
  }
  bool operator==(const RegionItem&) const = default;
};

// A sorted, immutable view of the entries of one kind.
template <typename Entry>
class Snapshot {
 public:
  static constexpr std::uint32_t kNone = UINT32_MAX;

  explicit Snapshot(std::vector<std::shared_ptr<Entry>> of_kind) : entries_(std::move(of_kind)) {
    std::sort(entries_.begin(), entries_.end(), [](const auto& a, const auto& b) {
      const auto key = [](const Region& r) { return std::tuple(r.device, r.address, r.length); };
      return key(a->region) < key(b->region);
    });
    items_.reserve(entries_.size());
    for (const auto& entry : entries_) {
      const Region& region = entry->region;
      const bool unbounded = region.length == 0 && is_storage(region.kind);
      const std::uint64_t end = unbounded ? UINT64_MAX : region.address + region.length;
      const bool follows = !items_.empty() && items_.back().device == region.device;
      items_.push_back({region.device, region.address, end, follows ? std::max(end, items_.back().reach) : end});
    }
  }

  // The place of an entry that holds [address, address + length) of `device`; kNone if there is none.
  std::uint32_t find(std::uint64_t device, std::uint64_t address, std::uint64_t length) const noexcept {
    const std::uint64_t end = address + length;
    if (end < address) return kNone;
    auto after = begun(device, address);
    while (after != items_.begin()) {
      --after;
      if (after->device != device || after->reach < end) return kNone;
      if (after->end >= end) return static_cast<std::uint32_t>(after - items_.begin());
    }
    return kNone;
  }
  // The place of the entry that holds the byte at `address` and reaches furthest; kNone if none does.
  std::uint32_t furthest(std::uint64_t device, std::uint64_t address) const noexcept {
    std::uint32_t best = kNone;
    for (auto after = begun(device, address); after != items_.begin();) {
      --after;
      if (after->device != device || after->reach <= address) break;
      if (after->end > address && (best == kNone || after->end > items_[best].end))
        best = static_cast<std::uint32_t>(after - items_.begin());
    }
    return best;
  }
  // Do entries that touch or overlap hold all of [address, address + length) together?
  bool spans(std::uint64_t device, std::uint64_t address, std::uint64_t length) const noexcept {
    const std::uint64_t end = address + length;
    if (end <= address) return false;  // empty ones are find()'s business
    while (address < end) {
      const std::uint32_t place = furthest(device, address);
      if (place == kNone) return false;
      address = items_[place].end;
    }
    return true;
  }
  const std::shared_ptr<Entry>& operator[](std::uint32_t place) const noexcept { return entries_[place]; }
  const RegionItem& item(std::uint32_t place) const noexcept { return items_[place]; }
  bool same_places(const Snapshot& other) const noexcept { return items_ == other.items_; }
  bool empty() const noexcept { return items_.empty(); }
  std::size_t size() const noexcept { return items_.size(); }

 private:
  // Past the last item of `device` that begins at or before `address`.
  std::vector<RegionItem>::const_iterator begun(std::uint64_t device, std::uint64_t address) const noexcept {
    return std::upper_bound(
        items_.begin(), items_.end(), std::pair(device, address),
        [](const auto& key, const RegionItem& item) { return key < std::pair(item.device, item.begin); });
  }
  std::vector<std::shared_ptr<Entry>> entries_;
  std::vector<RegionItem> items_;
};

// Entries are found by their place, without a copy of it.
struct PlaceHash {
  using is_transparent = void;
  std::size_t operator()(const Region& r) const noexcept {
    std::uint64_t h = r.address * 0x9E3779B97F4A7C15ull ^ r.length * 0xC2B2AE3D27D4EB4Full ^ r.device;
    return static_cast<std::size_t>(h ^ h >> 29) + static_cast<std::size_t>(r.kind);
  }
  template <typename Entry>
  std::size_t operator()(const std::shared_ptr<Entry>& entry) const noexcept {
    return (*this)(entry->region);
  }
};
struct SamePlace {
  using is_transparent = void;
  template <typename A, typename B>
  bool operator()(const A& a, const B& b) const noexcept {
    return same_place(region_of(a), region_of(b));
  }

 private:
  static const Region& region_of(const Region& region) noexcept { return region; }
  template <typename Entry>
  static const Region& region_of(const std::shared_ptr<Entry>& entry) noexcept {
    return entry->region;
  }
};

template <typename Entry>
class RegionIndex {
 public:
  using View = std::shared_ptr<const Snapshot<Entry>>;

  // Adds the entry; one of the same place is replaced and returned.
  std::shared_ptr<Entry> put(const std::shared_ptr<Entry>& entry) {
    const std::lock_guard lock(mutex_);
    return put_locked(entry);
  }
  // Adds all of them; returns those that were replaced.
  std::vector<std::shared_ptr<Entry>> put(const std::vector<std::shared_ptr<Entry>>& entries) {
    std::vector<std::shared_ptr<Entry>> replaced;
    const std::lock_guard lock(mutex_);
    entries_.reserve(entries_.size() + entries.size());
    for (const auto& entry : entries)
      if (auto old = put_locked(entry)) replaced.push_back(std::move(old));
    return replaced;
  }
  // The entry registered as exactly this place, or null.
  std::shared_ptr<Entry> exact(const Region& region) const {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(region);
    return found == entries_.end() ? nullptr : *found;
  }
  void remove(const Region& region) {
    const std::lock_guard lock(mutex_);
    views_[static_cast<int>(region.kind)].reset();
    if (const auto found = entries_.find(region); found != entries_.end()) entries_.erase(found);
  }
  // Removes and returns the entries for which `is_over` says yes.
  template <typename Condition>
  std::vector<std::shared_ptr<Entry>> remove_if(const Condition& is_over) {
    std::vector<std::shared_ptr<Entry>> removed;
    const std::lock_guard lock(mutex_);
    for (auto at = entries_.begin(); at != entries_.end();) {
      if (!is_over(**at)) {
        ++at;
        continue;
      }
      views_[static_cast<int>((*at)->region.kind)].reset();
      removed.push_back(*at);
      at = entries_.erase(at);
    }
    return removed;
  }
  std::vector<std::shared_ptr<Entry>> all() const {
    const std::lock_guard lock(mutex_);
    return {entries_.begin(), entries_.end()};
  }
  View snapshot(MemKind kind) const {
    const std::lock_guard lock(mutex_);
    View& view = views_[static_cast<int>(kind)];
    if (!view) {
      std::vector<std::shared_ptr<Entry>> of_kind;
      for (const auto& entry : entries_)
        if (entry->region.kind == kind) of_kind.push_back(entry);
      view = std::make_shared<Snapshot<Entry>>(std::move(of_kind));
    }
    return view;
  }

 private:
  std::shared_ptr<Entry> put_locked(const std::shared_ptr<Entry>& entry) {
    views_[static_cast<int>(entry->region.kind)].reset();
    const auto [found, added] = entries_.insert(entry);
    if (added) return nullptr;
    auto old = *found;
    entries_.insert(entries_.erase(found), entry);
    return old;
  }

  mutable std::mutex mutex_;
  std::unordered_set<std::shared_ptr<Entry>, PlaceHash, SamePlace> entries_;
  mutable View views_[kNumMemKinds];
};

}  // namespace nixl::core
