#include "backends/ucx/entry.h"

#include <algorithm>
#include <filesystem>

#include "backends/ucx/backend.h"
#include "base/env.h"

namespace nixl::core {
namespace {

Probe probe_ucx() {
  const auto api = ucx::open_api();
  if (!api) return {.viable = false, .reason = api.error().reason, .kinds = {}};
  KindSet kinds{MemKind::kDram};
  if (ucx::have_cuda_device()) kinds.add(MemKind::kVram);
  return {.viable = true, .reason = (*api)->remark + ", " + (*api)->path, .kinds = kinds};
}

Result<std::unique_ptr<Backend>> open_ucx(BackendConfig config) {
  const Probe probe = probe_ucx();
  if (!probe.viable) return fail(Code::kUnsupported, "%s", probe.reason.c_str());
  return ucx::UcxBackend::open(std::move(config), probe.kinds, 0);
}

int num_gpus() {
  int count = 0;
  std::error_code ignored;
  while (std::filesystem::exists("/dev/nvidia" + std::to_string(count), ignored)) ++count;
  return count;
}

Result<std::unique_ptr<Backend>> open_ucx_mo(BackendConfig config) {
  const Probe probe = probe_ucx();
  if (!probe.viable) return fail(Code::kUnsupported, "%s", probe.reason.c_str());
  const std::string text = config.params["num_ucx_engines"];
  const auto value = parse_int(text.empty() ? "8" : text);
  if (!value || *value < 1 || *value > 256)
    return fail(Code::kInvalidArgument, "UCX_MO parameter num_ucx_engines = '%s': an integer from 1 to 256 is needed",
                text.c_str());
  return ucx::UcxBackend::open(std::move(config), probe.kinds, std::max(static_cast<int>(*value), num_gpus()));
}

BackendEntry entry(const char* name, bool with_engines) {
  BackendEntry entry;
  entry.name = name;
  entry.params = ucx::default_params(with_engines);
  entry.param_prefix = "UCX_";
  entry.kinds = {MemKind::kDram, MemKind::kVram};
  entry.remote = entry.local = entry.notifications = true;
  entry.threads_param = "num_threads";
  entry.probe = &probe_ucx;
  entry.open = with_engines ? &open_ucx_mo : &open_ucx;
  return entry;
}

}  // namespace

std::span<const BackendEntry> backends_of_ucx() {
  static const BackendEntry entries[] = {entry("UCX", false), entry("UCX_MO", true)};
  return entries;
}

}  // namespace nixl::core
