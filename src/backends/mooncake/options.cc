#include "backends/mooncake/options.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>

#include <algorithm>
#include <filesystem>
#include <memory>

#include "backends/mooncake/wire.h"
#include "base/env.h"

namespace nixl::core::mooncake {
namespace {

std::vector<std::string> entries_of(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(folder, ignored))
    names.push_back(entry.path().filename().string());
  std::sort(names.begin(), names.end());
  return names;
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

std::string value_of(const Params& params, const char* key) {
  const auto found = params.find(key);
  return found == params.end() ? "" : found->second;
}

Result<void> check_devices(const EngineOptions& options, const std::vector<std::string>& present,
                           const std::string& folder) {
  for (const std::string& device : options.devices)
    if (std::find(present.begin(), present.end(), device) == present.end())
      return fail(Code::kInvalidArgument, "Mooncake parameter mooncake_devices names '%s'; %s has: %s", device.c_str(),
                  folder.c_str(), listed(present).c_str());
  return {};
}

}  // namespace

Result<std::string> own_address() {
  if (const auto wanted = env_text("NIXL_MOONCAKE_IP_ADDR")) {
    if (is_numeric_address(*wanted)) return *wanted;
    return fail(Code::kInvalidArgument, "NIXL_MOONCAKE_IP_ADDR is '%s': a numeric address of this host is needed",
                wanted->c_str());
  }
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return fail(errno_error("getifaddrs", errno));
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner(list, ::freeifaddrs);
  for (const ifaddrs* at = list; at; at = at->ifa_next) {
    if (!at->ifa_addr || at->ifa_addr->sa_family != AF_INET) continue;
    if ((at->ifa_flags & IFF_LOOPBACK) || !(at->ifa_flags & IFF_UP)) continue;
    char text[INET_ADDRSTRLEN] = {};
    ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(at->ifa_addr)->sin_addr, text, sizeof text);
    return std::string(text);
  }
  return std::string("127.0.0.1");
}

Result<EngineOptions> engine_options(const Params& params, const Machine& machine) {
  EngineOptions options;
  options.protocol = value_of(params, "protocol");
  if (options.protocol.empty()) options.protocol = "auto";
  if (options.protocol != "auto" && options.protocol != "tcp" && options.protocol != "rdma")
    return fail(Code::kInvalidArgument, "Mooncake parameter protocol is '%s': auto, tcp or rdma is needed",
                options.protocol.c_str());
  options.devices = parse_words(value_of(params, "mooncake_devices"));
  const std::vector<std::string> present = entries_of(machine.rdma_folder);
  NIXL_TRY(check_devices(options, present, machine.rdma_folder));
  if (options.protocol == "tcp" && !options.devices.empty())
    return fail(
        Code::kInvalidArgument,
        "Mooncake parameter mooncake_devices names RDMA devices (%s), and protocol is tcp: leave one of them out",
        listed(options.devices).c_str());
  if (options.protocol == "rdma" && present.empty())
    return fail(Code::kInvalidArgument, "Mooncake parameter protocol is rdma, and %s has no device: use tcp or auto",
                machine.rdma_folder.c_str());
  if (options.protocol == "auto") options.protocol = present.empty() ? "tcp" : "rdma";
  NIXL_ASSIGN(options.address, own_address());
  return options;
}

}  // namespace nixl::core::mooncake
