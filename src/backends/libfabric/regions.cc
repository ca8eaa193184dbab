#include "backends/libfabric/regions.h"

#include <atomic>

namespace nixl::core::libfabric {
namespace {

std::uint64_t next_region_id() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

}  // namespace

Result<std::unique_ptr<Registered>> Registered::open(Engine& engine, const Region& region, Release on_release) {
  std::unique_ptr<Registered> registered(new Registered());
  registered->engine_ = &engine;
  registered->id_ = next_region_id();
  {
    const auto guard = engine.lock();
    for (const auto& rail : engine.rails()) {
      auto mapping = rail->map_locked(region);
      if (!mapping) {
        registered->mappings_.clear();
        return fail(std::move(mapping.error()));
      }
      registered->mappings_.push_back(std::move(*mapping));
    }
  }
  registered->on_release_ = std::move(on_release);
  return registered;
}

Registered::~Registered() {
  if (on_release_) on_release_(*this);
  if (mappings_.empty()) return;
  const auto guard = engine_->lock();
  mappings_.clear();
}

RegionKey Registered::key() const {
  RegionKey key;
  key.id = id_;
  for (const auto& mapping : mappings_) key.rails.push_back({mapping->key(), mapping->base()});
  return key;
}

Result<std::unique_ptr<Imported>> Imported::open(std::string_view bytes, network::ImportedTable& table,
                                                 std::uint64_t incarnation) {
  NIXL_ASSIGN(RegionKey key, decode_key(bytes));
  return std::unique_ptr<Imported>(new Imported(std::move(key), table, incarnation));
}

}  // namespace nixl::core::libfabric
