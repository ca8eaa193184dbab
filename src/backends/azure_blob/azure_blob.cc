#include "backends/azure_blob/azure_blob.h"

#include <unistd.h>

#include <algorithm>

#include "backends/azure_blob/azure.h"
#include "backends/objects/object_backend.h"
#include "base/env.h"

namespace nixl::core {
namespace {

constexpr Nanoseconds kFirstContact = 2'000'000'000;

std::string text(const Params& params, const char* key, const char* variable) {
  const auto found = params.find(key);
  if (found != params.end() && !found->second.empty()) return found->second;
  return variable ? env_text(variable).value_or("") : "";
}

Result<std::unique_ptr<Backend>> open_azure(BackendConfig config) {
  NIXL_ASSIGN(azure::AzureConfig target, azure::read_config(config.params));
  http::ClientConfig client_config;
  const std::string threads = text(config.params, "num_threads", nullptr);
  const auto count =
      threads.empty() ? std::max(1l, ::sysconf(_SC_NPROCESSORS_ONLN) / 2) : parse_int(threads).value_or(0);
  if (count < 1)
    return fail(Code::kInvalidArgument, "AZURE_BLOB parameter num_threads is '%s': a number >= 1 is needed",
                threads.c_str());
  client_config.num_threads = static_cast<unsigned>(std::min<std::int64_t>(count, 64));
  client_config.ca_bundle = text(config.params, "ca_bundle", "AZURE_CA_BUNDLE");
  if (!client_config.ca_bundle.empty() && ::access(client_config.ca_bundle.c_str(), R_OK) != 0)
    return fail(errno_error("AZURE_BLOB parameter ca_bundle: " + client_config.ca_bundle, errno));
  NIXL_ASSIGN(auto client, http::Client::open(client_config));

  auto protocol = std::make_unique<azure::Azure>(std::move(target));
  http::Call call = protocol->head_container();
  call.deadline = Deadline::after(kFirstContact);
  if (const http::Outcome contact = client->perform(std::move(call));
      contact.failed && contact.error.code != Code::kTimeout)
    return fail(within("AZURE_BLOB cannot reach its server (parameters account_url, connection_string, ca_bundle)",
                       contact.error));
  NIXL_ASSIGN(auto engine, http::ObjectEngine::open(std::move(client), std::move(protocol), {}));
  return std::make_unique<ObjectBackend>("AZURE_BLOB", "https+azure", std::move(config), std::move(engine));
}

Probe probe_azure() {
  return {true,
          "untested against a real server: only its signatures and requests are checked",
          {MemKind::kDram, MemKind::kObject}};
}

}  // namespace

std::span<const BackendEntry> backends_of_azure_blob() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "AZURE_BLOB";
    entry.params = {
        {"account_url", ""}, {"ca_bundle", ""}, {"connection_string", ""}, {"container_name", ""}, {"num_threads", ""}};
    entry.kinds = {MemKind::kDram, MemKind::kObject};
    entry.local = true;
    entry.threads_param = "num_threads";
    entry.probe = probe_azure;
    entry.open = open_azure;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
