#include "backends/gpunetio/gpunetio.h"

#include "backends/gpunetio/entry.h"
#include "backends/gpunetio/options.h"

namespace nixl::core {
namespace gpunetio {

Probe probe(const Machine& machine) {
  std::string reason;
  for (const std::string& line : missing(machine)) reason += (reason.empty() ? "" : "; ") + line;
  if (reason.empty())
    reason = "all that it needs is here, but its data path is not in this release; UCX moves GPU memory over RDMA";
  return {false, std::move(reason), {}};
}

Result<std::unique_ptr<Backend>> open(const BackendConfig& config, const Machine& machine) {
  if (missing(machine).empty()) NIXL_TRY(read_options(config.params, machine));
  return fail(Code::kUnsupported, "GPUNETIO: %s", probe(machine).reason.c_str());
}

}  // namespace gpunetio

std::span<const BackendEntry> backends_of_gpunetio() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "GPUNETIO";
    entry.params = {{"cuda_streams", ""}, {"gpu_devices", ""}, {"network_devices", ""}, {"oob_interface", ""}};
    entry.kinds = {MemKind::kVram, MemKind::kDram};
    entry.remote = entry.notifications = true;
    entry.probe = [] {
      static const Probe kHere = gpunetio::probe(gpunetio::Machine::this_one());  // libraries are opened once a process
      return kHere;
    };
    entry.open = [](BackendConfig config) { return gpunetio::open(config, gpunetio::Machine::this_one()); };
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
