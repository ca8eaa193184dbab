// Registered and imported memory.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "backends/libfabric/engine.h"
#include "backends/network/imported.h"
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

// A peer's region, or our own as the target of our own transfers.
class Imported final : public network::ImportedRegion {
 public:
  // kMismatch: not the bytes of encode(RegionKey).
  static Result<std::unique_ptr<Imported>> open(std::string_view key, network::ImportedTable& table,
                                                std::uint64_t incarnation);
  std::size_t num_rails() const noexcept { return rails_.size(); }
  const RegionKey::OnRail& on_rail(std::uint32_t rail) const noexcept { return rails_[rail]; }

 private:
  Imported(RegionKey key, network::ImportedTable& table, std::uint64_t incarnation)
      : ImportedRegion(table, incarnation, key.id), rails_(std::move(key.rails)) {}
  const std::vector<RegionKey::OnRail> rails_;
};

}  // namespace nixl::core::libfabric
