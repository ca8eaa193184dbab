#include "backends/libfabric/provider.h"

#include <net/if.h>
#include <netinet/in.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <string_view>

namespace nixl::core::libfabric {
namespace {

constexpr std::size_t kMaxRails = 64;

// The order of "auto": hardware, best first, then whatever is not known here, then what runs over the kernel's sockets.
constexpr std::string_view kHardware[] = {"efa", "cxi", "verbs", "psm3", "opx", "psm2", "gni", "bgq"};
constexpr std::string_view kSoftware[] = {"tcp", "net", "sockets", "udp"};
// Never taken: they end at this host, where there is a better way, and shm crashes when a peer ends.
constexpr std::string_view kThisHostOnly[] = {"shm", "sm2", "lnx", "psm"};

bool is_or_begins(std::string_view provider, std::string_view name) {
  return provider == name || (provider.starts_with(name) && provider[name.size()] == ';');
}

int rank(std::string_view provider) {
  int place = 0;
  for (const std::string_view name : kHardware) {
    if (is_or_begins(provider, name)) return place;
    ++place;
  }
  for (const std::string_view name : kThisHostOnly)
    if (is_or_begins(provider, name)) return -1;
  for (const std::string_view name : kSoftware) {
    ++place;
    if (is_or_begins(provider, name)) return place;
  }
  return std::size(kHardware);
}

struct Wish {
  bool delivery_complete = true, device_memory = false;
};

// Every way there is, or null.
Info query(const Api& api, Wish wish) {
  const Info hints(api.dupinfo(nullptr), {&api});
  if (!hints) return Info(nullptr, {&api});
  hints->caps = FI_MSG | FI_RMA | (wish.device_memory ? FI_HMEM : 0);
  hints->mode = FI_CONTEXT | FI_CONTEXT2;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->threading = FI_THREAD_DOMAIN;  // everything of a backend happens under one lock
  hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
  hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
  hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
  hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_ENDPOINT |
                                (wish.device_memory ? FI_MR_HMEM : 0);
  hints->tx_attr->msg_order = hints->rx_attr->msg_order = FI_ORDER_SAS | (wish.delivery_complete ? 0 : FI_ORDER_SAW);
  if (wish.delivery_complete) hints->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
  fi_info* found = nullptr;
  if (api.getinfo(kApiVersion, nullptr, nullptr, 0, hints.get(), &found) != 0) found = nullptr;
  return Info(found, {&api});
}

std::string provider_of(const fi_info* info) {
  return info->fabric_attr && info->fabric_attr->prov_name ? info->fabric_attr->prov_name : "";
}

// Addresses of a device in the order of preference; below zero: of no use to other hosts.
int address_quality(const fi_info& info) {
  if (!info.src_addr) return 1;
  if (info.addr_format == FI_SOCKADDR_IN) {
    const auto& address = *static_cast<const sockaddr_in*>(info.src_addr);
    return ntohl(address.sin_addr.s_addr) >> 24 == 127 ? -1 : 2;
  }
  if (info.addr_format == FI_SOCKADDR_IN6) {
    const in6_addr& address = static_cast<const sockaddr_in6*>(info.src_addr)->sin6_addr;
    if (IN6_IS_ADDR_LINKLOCAL(&address)) return -2;
    return IN6_IS_ADDR_LOOPBACK(&address) ? -1 : 1;
  }
  return 1;
}

// One rail a device: its best address. Those of the loopback device only where there is nothing else.
std::vector<Info> rails_of(const Api& api, const fi_info* list, const std::string& provider) {
  std::vector<const fi_info*> best;
  for (const fi_info* info = list; info; info = info->next) {
    if (provider_of(info) != provider || address_quality(*info) == -2) continue;
    const std::string_view device = info->domain_attr->name ? info->domain_attr->name : "";
    const auto same = std::find_if(best.begin(), best.end(), [&](const fi_info* other) {
      return device == (other->domain_attr->name ? other->domain_attr->name : "");
    });
    if (same == best.end())
      best.push_back(info);
    else if (address_quality(*info) > address_quality(**same))
      *same = info;
  }
  const bool any_good = std::any_of(best.begin(), best.end(), [](auto* info) { return address_quality(*info) >= 0; });
  std::vector<Info> rails;
  for (const fi_info* info : best)
    if ((!any_good || address_quality(*info) >= 0) && rails.size() < kMaxRails)
      rails.emplace_back(api.dupinfo(info), FreeInfo{&api});
  return rails;
}

// Providers may offer FI_HMEM for the host's memory alone. Only a libfabric that was built with CUDA knows settings for it.
bool knows_cuda(const Api& api) {
  fi_param* settings = nullptr;
  int count = 0;
  if (api.getparams(&settings, &count) != 0) return false;
  const bool knows = std::any_of(settings, settings + count, [](const fi_param& setting) {
    return std::string_view(setting.name).find("HMEM_CUDA") != std::string_view::npos;
  });
  api.freeparams(settings);
  return knows;
}

std::string joined(const std::set<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

std::string all_providers(const Api& api) {
  fi_info* found = nullptr;
  if (api.getinfo(kApiVersion, nullptr, nullptr, FI_PROV_ATTR_ONLY, nullptr, &found) != 0) return "none";
  const Info list(found, {&api});
  std::set<std::string> names;
  for (const fi_info* info = list.get(); info; info = info->next) names.insert(provider_of(info));
  return joined(names);
}

std::string best_of(const fi_info* list, const std::string& asked) {
  std::string best;
  for (const fi_info* info = list; info; info = info->next) {
    const std::string name = provider_of(info);
    if (rank(name) < 0 || (asked != "auto" && !is_or_begins(name, asked))) continue;
    if (name == asked) return name;
    if (best.empty() || rank(name) < rank(best)) best = name;
  }
  return best;
}

}  // namespace

Result<Provider> choose_provider(const Api& api, const std::string& asked, bool device_memory) {
  std::set<std::string> capable;
  for (const bool delivery_complete : {true, false}) {
    const Info list = query(api, {delivery_complete, false});
    for (const fi_info* info = list.get(); info; info = info->next)
      if (rank(provider_of(info)) >= 0) capable.insert(provider_of(info));
    Provider provider;
    provider.name = best_of(list.get(), asked);
    if (provider.name.empty()) continue;
    provider.delivery_complete = delivery_complete;
    provider.rails = rails_of(api, list.get(), provider.name);
    if (device_memory && knows_cuda(api)) {
      const Info with_devices = query(api, {delivery_complete, true});
      auto rails = rails_of(api, with_devices.get(), provider.name);
      provider.device_memory = !rails.empty();
      if (provider.device_memory) provider.rails = std::move(rails);
    }
    if (!delivery_complete && provider.rails.size() > 1) provider.rails.resize(1);
    if (!provider.rails.empty()) return provider;
  }
  return fail(
      Code::kUnsupported,
      "no RMA-capable provider%s%s in libfabric %s (%s): one-sided reads and writes between hosts are offered by: %s; "
      "its providers: %s",
      asked == "auto" ? "" : " named ", asked == "auto" ? "" : asked.c_str(), api.version_text.c_str(),
      api.path.c_str(), joined(capable).c_str(), all_providers(api).c_str());
}

}  // namespace nixl::core::libfabric
