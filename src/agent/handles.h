// Numbers for objects: what crosses to callers who cannot hold a pointer. A number carries its kind and its table and is not
// used twice, so a stale one, and one of another kind or agent, is recognised. All functions may be called from any threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <vector>

namespace nixl::core {

enum class HandleKind : std::uint64_t { kList = 1, kRequest = 2 };

// kind (upper 4 bits), table (8), round of the place (24), place + 1 (28)
template <typename T, HandleKind kKind>
class Handles {
 public:
  std::uint64_t add(std::shared_ptr<T> object) {
    const std::unique_lock lock(mutex_);
    std::uint32_t place;
    if (free_.empty()) {
      place = static_cast<std::uint32_t>(cells_.size());
      cells_.emplace_back();
    } else {
      place = free_.back();
      free_.pop_back();
    }
    Cell& cell = cells_[place];
    cell.object = std::move(object);
    return tag_ << kTagShift | static_cast<std::uint64_t>(cell.round) << kRoundShift | (place + 1);
  }
  std::shared_ptr<T> get(std::uint64_t handle) const {
    const std::shared_lock lock(mutex_);
    const Cell* cell = find(handle);
    return cell ? cell->object : nullptr;
  }
  std::shared_ptr<T> take(std::uint64_t handle) {
    const std::unique_lock lock(mutex_);
    auto* cell = const_cast<Cell*>(find(handle));
    if (!cell) return nullptr;
    cell->round = (cell->round + 1) & kRoundMask;
    free_.push_back(static_cast<std::uint32_t>(handle & kPlaceMask) - 1);
    return std::move(cell->object);
  }
  std::vector<std::shared_ptr<T>> all() const {
    const std::shared_lock lock(mutex_);
    std::vector<std::shared_ptr<T>> list;
    for (const Cell& cell : cells_)
      if (cell.object) list.push_back(cell.object);
    return list;
  }

 private:
  struct Cell {
    std::shared_ptr<T> object;
    std::uint32_t round = 1;
  };
  const Cell* find(std::uint64_t handle) const {
    const std::uint64_t place = handle & kPlaceMask;
    if (place == 0 || place > cells_.size()) return nullptr;
    const Cell& cell = cells_[place - 1];
    const bool mine = handle >> kTagShift == tag_ && (handle >> kRoundShift & kRoundMask) == cell.round;
    return cell.object && mine ? &cell : nullptr;
  }
  static std::uint64_t next_tag() {
    static std::atomic<std::uint32_t> tables{0};
    return static_cast<std::uint64_t>(kKind) << 8 | (tables.fetch_add(1, std::memory_order_relaxed) & 255);
  }
  static constexpr int kTagShift = 52, kRoundShift = 28;
  static constexpr std::uint32_t kRoundMask = (1u << 24) - 1, kPlaceMask = (1u << 28) - 1;
  const std::uint64_t tag_ = next_tag();
  mutable std::shared_mutex mutex_;
  std::vector<Cell> cells_;
  std::vector<std::uint32_t> free_;
};

}  // namespace nixl::core
