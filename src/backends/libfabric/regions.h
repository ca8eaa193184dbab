// Registered and imported memory.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "backends/libfabric/engine.h"
#include "contract/backend.h"

namespace nixl::core::libfabric {

// A region registered here, with every rail.
class Registered final : public LocalRegion {
 public:
  using Release = std::function<void(Registered&)>;
  // `on_release` runs first of all when it goes.
  static Result<std::unique_ptr<Registered>> open(Engine& engine, const Region& region, Release on_release);
  ~Registered() override;

  void* descriptor(unsigned rail) const noexcept { return mappings_[rail]->descriptor(); }
  RegionKey key() const;
  std::uint64_t id() const noexcept { return id_; }
  bool exported = false;

 private:
  Registered() = default;
  Engine* engine_ = nullptr;
  Release on_release_;
  std::uint64_t id_ = 0;
  std::vector<std::unique_ptr<Mapping>> mappings_;  // one a rail
};

class Imported;

// Imported regions by peer, so that a peer's revocation finds them. Thread-safe.
class ImportedTable {
 public:
  void add(std::uint64_t incarnation, Imported& region);
  void remove(std::uint64_t incarnation, Imported& region);
  void revoke(std::uint64_t incarnation, std::uint64_t region);

 private:
  std::mutex mutex_;
  std::unordered_map<std::uint64_t, std::vector<Imported*>> regions_;
};

// A peer's region, or our own as the target of our own transfers.
class Imported final : public RemoteRegion {
 public:
  // kMismatch: not the bytes of encode(RegionKey).
  static Result<std::unique_ptr<Imported>> open(std::string_view key, ImportedTable& table, std::uint64_t incarnation);
  ~Imported() override { table_->remove(incarnation_, *this); }

  std::uint64_t id() const noexcept { return key_.id; }
  std::size_t num_rails() const noexcept { return key_.rails.size(); }
  const RegionKey::OnRail& on_rail(std::uint32_t rail) const noexcept { return key_.rails[rail]; }

  std::atomic<bool> revoked{false};

 private:
  friend class ImportedTable;
  Imported(RegionKey key, ImportedTable& table, std::uint64_t incarnation)
      : key_(std::move(key)), table_(&table), incarnation_(incarnation) {}
  const RegionKey key_;
  ImportedTable* const table_;
  const std::uint64_t incarnation_;
  std::size_t place_ = 0;  // in the table
};

}  // namespace nixl::core::libfabric
