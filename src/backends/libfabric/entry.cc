#include "backends/libfabric/entry.h"

#include <dlfcn.h>

#include <filesystem>

#include "backends/libfabric/backend.h"
#include "backends/libfabric/provider.h"
#include "base/env.h"

namespace nixl::core {
namespace {

bool have_cuda_device() {
  static const bool have = [] {
    std::error_code ignored;
    if (!std::filesystem::exists("/dev/nvidiactl", ignored)) return false;
    return dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) != nullptr;  // kept open: libfabric opens it anyway
  }();
  return have;
}

Probe probe_now() {
  const auto api = libfabric::open_api();
  if (!api) return {.viable = false, .reason = api.error().reason, .kinds = {}};
  const auto provider =
      libfabric::choose_provider(**api, env_text("NIXL_LIBFABRIC_PROVIDER").value_or("auto"), have_cuda_device());
  if (!provider) return {.viable = false, .reason = provider.error().reason, .kinds = {}};
  Probe probe{.viable = true, .reason = {}, .kinds = {MemKind::kDram}};
  if (provider->device_memory) probe.kinds.add(MemKind::kVram);
  probe.reason = "libfabric " + (*api)->version_text + ", " + (*api)->path + ", provider " + provider->name;
  if (have_cuda_device() && !provider->device_memory)
    probe.reason += ", without GPU memory: that takes FI_HMEM of the provider and a libfabric built with CUDA";
  return probe;
}

// libfabric starts all its providers at the first question, which takes a while.
Probe probe_libfabric() {
  static const Probe probe = probe_now();
  return probe;
}

Result<std::unique_ptr<Backend>> open_libfabric(BackendConfig config) {
  const Probe probe = probe_libfabric();
  if (!probe.viable) return fail(Code::kUnsupported, "%s", probe.reason.c_str());
  return libfabric::FabricBackend::open(std::move(config), have_cuda_device());
}

}  // namespace

std::span<const BackendEntry> backends_of_libfabric() {
  static const BackendEntry entry = [] {
    BackendEntry entry;
    entry.name = "LIBFABRIC";
    entry.aliases = {"Libfabric"};
    entry.params = libfabric::default_params();
    entry.kinds = {MemKind::kDram, MemKind::kVram};
    entry.remote = entry.local = entry.notifications = true;
    entry.threads_param = "num_threads";
    entry.probe = &probe_libfabric;
    entry.open = &open_libfabric;
    return entry;
  }();
  return {&entry, 1};
}

}  // namespace nixl::core
