#include "backends/azure_blob/azure_blob.h"

#include "backends/azure_blob/azure.h"
#include "backends/objects/object_backend.h"

namespace nixl::core {
namespace {

Result<std::unique_ptr<Backend>> open_azure(BackendConfig config) {
  NIXL_ASSIGN(azure::AzureConfig target, azure::read_config(config.params));
  const Parameters params("AZURE_BLOB", config.params);
  NIXL_ASSIGN(auto client, open_client(params, "AZURE_CA_BUNDLE"));
  auto protocol = std::make_unique<azure::Azure>(std::move(target));
  NIXL_TRY(first_contact(*client, protocol->head_container(),
                         "AZURE_BLOB cannot reach its server (parameters account_url, connection_string, ca_bundle)"));
  NIXL_ASSIGN(auto engine, http::ObjectEngine::open(std::move(client), std::move(protocol), {}));
  return std::make_unique<ObjectBackend>("AZURE_BLOB", "https+azure", std::move(config), std::move(engine));
}

Probe probe_azure() {
  return {true, "untested against a real server: only its signatures and requests are checked",
          staged_memory_kinds() | KindSet{MemKind::kObject}};
}

}  // namespace

std::span<const BackendEntry> backends_of_azure_blob() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "AZURE_BLOB";
    entry.params = {
        {"account_url", ""}, {"ca_bundle", ""}, {"connection_string", ""}, {"container_name", ""}, {"num_threads", ""}};
    entry.kinds = {MemKind::kDram, MemKind::kVram, MemKind::kObject};
    entry.local = true;
    entry.threads_param = "num_threads";
    entry.probe = probe_azure;
    entry.open = open_azure;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
