// StorageBackend: a backend between memory and storage of its own agent. It knows registrations, the loopback target,
// whose name may connect and which kinds go together; a backend adds what a place of its storage is and how a plan is
// carried out. GPU memory, where there is a GPU, comes with a Copier through pinned host buffers.
#pragma once
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backends/storage/engine_transfer.h"
#include "base/copier.h"
#include "contract/backend.h"
#include "device/staging/gpu_copier.h"
#include "device/staging/gpu_driver.h"

namespace nixl::core {

// The memory kinds that a storage backend serves here and now: GPU memory only where there is a GPU.
inline KindSet staged_memory_kinds() {
  KindSet kinds = {MemKind::kDram};
  if (GpuDriver::probe()) kinds.add(MemKind::kVram);
  return kinds;
}

// `Place`: an open file, a volume, a key; cheap to copy, shared by the registrations and transfers that use it.
template <typename Place>
class StorageBackend : public Backend {
 public:
  const Abilities& abilities() const noexcept final { return abilities_; }

  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) final {
    if (region.kind == storage_) {
      NIXL_ASSIGN(Place place, open_place(region));
      return std::make_unique<Stored>(std::move(place));
    }
    if (region.kind == MemKind::kDram) return std::make_unique<Memory>();
    if (region.kind != MemKind::kVram)
      return fail(Code::kInvalidArgument, "%s takes %s and %s, not %s", name_.c_str(), memory_text(),
                  nixl::core::name(storage_), nixl::core::name(region.kind));
    return add_vram(region);
  }
  Result<std::unique_ptr<RemoteRegion>> loopback_region(Connection&, const Region& region, LocalRegion& local) final {
    if (region.kind != storage_) return std::make_unique<RemoteRegion>();
    return std::make_unique<Target>(static_cast<Stored&>(local).place);
  }
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view) final {
    if (peer.name != config_.self.name)
      return fail(Code::kInvalidArgument, "%s serves its own agent '%s' only, not '%s'", name_.c_str(),
                  config_.self.name.c_str(), peer.name.c_str());
    return std::make_unique<Connection>();
  }
  Result<std::unique_ptr<Transfer>> prepare(Plan plan) final {
    if (plan.remote_kind != storage_ || !abilities_.local_kinds.has(plan.local_kind))
      return fail(Code::kInvalidArgument, "%s moves between %s (local) and %s (remote), not %s and %s", name_.c_str(),
                  memory_text(), nixl::core::name(storage_), nixl::core::name(plan.local_kind),
                  nixl::core::name(plan.remote_kind));
    return prepare_transfer(plan);
  }

 protected:
  struct Memory : LocalRegion {
    Copier* copier = nullptr;  // null: the storage reaches it in place
  };
  struct Block {
    std::uint32_t local, remote;  // indices into the plan's regions
    std::uint64_t offset;
    std::byte* memory;
    std::uint64_t bytes;
    Copier* copier;
  };

  StorageBackend(std::string name, BackendConfig config, MemKind storage)
      : name_(std::move(name)),
        config_(std::move(config)),
        storage_(storage),
        abilities_{staged_memory_kinds(), {storage}, false, true, true} {}

  virtual Result<Place> open_place(const Region& region) = 0;
  virtual Result<std::unique_ptr<Transfer>> prepare_transfer(const Plan& plan) = 0;
  virtual Result<std::unique_ptr<LocalRegion>> add_vram(const Region& region) {
    auto added = std::make_unique<Memory>();
    NIXL_ASSIGN(added->copier, vram_copier(region));
    return added;
  }
  Result<Copier*> vram_copier(const Region& region) const {
    auto copier = gpu_copier(region.device);
    if (!copier) return fail(within(name_ + " cannot take VRAM_SEG", std::move(copier).error()));
    return copier;
  }

  // body(const Block&) -> Result<void>, for every block of the plan in order; ends with the first error.
  template <typename F>
  static Result<void> each_block(const Plan& plan, F body) {
    for (std::size_t row = 0; row < plan.num_rows(); ++row) {
      Copier* const copier = static_cast<Memory*>(plan.local_regions[plan.local_region[row]])->copier;
      const std::uint64_t count = plan.has_runs() ? plan.count[row] : 1;
      for (std::uint64_t block = 0; block < count; ++block) {
        const std::uint64_t memory = plan.local_address[row] + (block ? block * plan.local_stride[row] : 0);
        const std::uint64_t offset = plan.remote_address[row] + (block ? block * plan.remote_stride[row] : 0);
        NIXL_TRY(body(Block{plan.local_region[row], plan.remote_region[row], offset,
                            reinterpret_cast<std::byte*>(memory), plan.length[row], copier}));
      }
    }
    return {};
  }
  static std::vector<Place> places_of(const Plan& plan) {
    std::vector<Place> places;
    for (RemoteRegion* region : plan.remote_regions) places.push_back(static_cast<Target*>(region)->place);
    return places;
  }

  const std::string& name() const noexcept { return name_; }

 private:
  struct Stored final : LocalRegion {
    explicit Stored(Place p) : place(std::move(p)) {}
    Place place;
  };
  struct Target final : RemoteRegion {
    explicit Target(Place p) : place(std::move(p)) {}
    Place place;
  };
  const char* memory_text() const noexcept {
    return abilities_.local_kinds.has(MemKind::kVram) ? "DRAM_SEG or VRAM_SEG" : "DRAM_SEG";
  }

  const std::string name_;
  const BackendConfig config_;
  const MemKind storage_;
  const Abilities abilities_;
};

}  // namespace nixl::core
