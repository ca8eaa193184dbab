// A peer's regions, and how its revocations find them.
#pragma once
#include <atomic>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "contract/backend.h"

namespace nixl::core::network {

class ImportedRegion;

// Imported regions by peer. Thread-safe. Adding and removing are what happens by the thousand; a revocation may look at
// all regions of its peer.
class ImportedTable {
 public:
  void revoke(std::uint64_t incarnation, std::uint64_t region);

 private:
  friend class ImportedRegion;
  void add(ImportedRegion& region);
  void remove(ImportedRegion& region);

  std::mutex mutex_;
  std::unordered_map<std::uint64_t, std::vector<ImportedRegion*>> regions_;
};

// In the table, which outlives it, as long as it lives.
class ImportedRegion : public RemoteRegion {
 public:
  ImportedRegion(ImportedTable& table, std::uint64_t incarnation, std::uint64_t id);
  ~ImportedRegion() override { table_.remove(*this); }
  ImportedRegion(const ImportedRegion&) = delete;

  std::uint64_t id() const noexcept { return id_; }  // at its owner
  bool revoked() const noexcept { return revoked_.load(std::memory_order_relaxed); }

 private:
  friend class ImportedTable;
  ImportedTable& table_;
  const std::uint64_t incarnation_;
  const std::uint64_t id_;
  std::size_t place_ = 0;  // in the table
  std::atomic<bool> revoked_{false};
};

}  // namespace nixl::core::network
