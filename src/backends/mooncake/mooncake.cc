#include "backends/mooncake/mooncake.h"

#include "backends/mooncake/backend.h"
#include "backends/mooncake/options.h"
#include "device/staging/gpu_driver.h"

namespace nixl::core {
namespace {

Probe probe_mooncake() {
  const auto api = mooncake::Api::load();
  if (!api) return {false, api.error().reason, {}};
  Probe probe{true, (*api)->file, {MemKind::kDram}};
  if (!(*api)->moves_gpu_memory)
    probe.reason += ", built without CUDA: no GPU memory";
  else if (GpuDriver::probe())
    probe.kinds.add(MemKind::kVram);
  return probe;
}

Result<std::unique_ptr<Backend>> open_mooncake(BackendConfig config) {
  NIXL_ASSIGN(mooncake::EngineOptions options, mooncake::engine_options(config.params));
  NIXL_ASSIGN(const mooncake::Api* api, mooncake::Api::load());
  return mooncake::MooncakeBackend::open(std::move(config), *api, std::move(options), probe_mooncake().kinds);
}

}  // namespace

std::span<const BackendEntry> backends_of_mooncake() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "Mooncake";
    entry.aliases = {"MOONCAKE"};
    entry.params = {{"mooncake_devices", ""}, {"protocol", "auto"}};
    entry.kinds = {MemKind::kDram, MemKind::kVram};
    entry.remote = entry.local = entry.notifications = true;
    entry.probe = probe_mooncake;
    entry.open = open_mooncake;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
