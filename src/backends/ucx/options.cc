#include "backends/ucx/options.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "base/env.h"
#include "base/log.h"

namespace nixl::core::ucx {
namespace {

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.remove_suffix(1);
  return text;
}

std::string_view without_prefix(std::string_view key) {
  return key.starts_with("UCX_") ? key.substr(4) : key;
}

const std::string& value_of(const Params& params, const char* key) {
  static const std::string empty;
  const auto found = params.find(key);
  return found == params.end() ? empty : found->second;
}

Result<std::int64_t> int_param(const Params& params, const char* key, std::int64_t fallback, std::int64_t low,
                               std::int64_t high) {
  const std::string& text = value_of(params, key);
  if (text.empty()) return fallback;
  const auto value = parse_int(text);
  if (!value || *value < low || *value > high)
    return fail(Code::kInvalidArgument, "UCX parameter %s = '%s': an integer from %lld to %lld is needed", key,
                text.c_str(), static_cast<long long>(low), static_cast<long long>(high));
  return *value;
}

// "A=1,B=x,y,C=2": a part without '=' continues the value before it.
Result<void> parse_engine_config(const std::string& text, Options& options) {
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    const std::string_view part = trimmed(std::string_view(text).substr(at, end - at));
    at = end + 1;
    if (part.empty()) continue;
    const std::size_t equals = part.find('=');
    if (equals != std::string_view::npos)
      options.entries.emplace_back(without_prefix(part.substr(0, equals)), part.substr(equals + 1));
    else if (!options.entries.empty())
      options.entries.back().second += "," + std::string(part);
    else
      return fail(Code::kInvalidArgument, "UCX parameter engine_config = '%s': KEY=VALUE[,KEY=VALUE] is needed",
                  text.c_str());
  }
  return {};
}

bool have_efa_device() {
  std::error_code ignored;
  for (const auto& device : std::filesystem::directory_iterator("/sys/class/infiniband", ignored))
    if (std::filesystem::read_symlink(device.path() / "device/driver", ignored).filename() == "efa") return true;
  return false;
}

// Ours, where neither the caller nor the environment says otherwise.
std::vector<std::pair<std::string, std::string>> own_defaults(const Api& api) {
  std::vector<std::pair<std::string, std::string>> list = {
      {"RNDV_THRESH", "inf"},  // messages are small and bulk goes one-sided: never wait for a rendezvous
      {"MAX_RMA_RAILS", "2"},  // two NICs share a large transfer
      {"IB_PCI_RELAXED_ORDERING", "try"},
      {"RC_FENCE", "none"},    // order is made by flushes
      {"TCP_CONN_NB", "y"},    // connecting to a host that does not answer must not block the caller
      {"TCP_KEEPIDLE", "5s"},  // a cut cable shows after about 8 s when idle,
      {"TCP_KEEPINTVL", "1s"},
      {"TCP_USER_TIMEOUT", "20s"},  // and after about 20 s with data under way
  };
  unsigned major = 0, minor = 0;
  if (std::sscanf(api.get_version_string(), "%u.%u", &major, &minor) == 2) {
    const unsigned version = major * 1000 + minor;
    if (version >= 1021) {
      list.emplace_back("RC_GDA_NUM_CHANNELS", "4");
      list.emplace_back("MAX_HCA_PER_GPU", "auto");
    }
    if (version >= 1022) list.emplace_back("RNDV_PIPELINE_ERROR_HANDLING", "y");
  }
  if (have_efa_device()) {
    list.emplace_back("ADDRESS_VERSION", "v2");
    list.emplace_back("MAX_COMPONENT_MDS", "32");
  }
  return list;
}

}  // namespace

Params default_params(bool with_engines) {
  Params params = {{"ucx_devices", ""},
                   {"device_list", ""},
                   {"num_workers", "1"},
                   {"num_threads", "0"},
                   {"split_batch_size", "1024"},
                   {"ucx_num_device_channels", "4"},
                   {"ucx_error_handling_mode", "peer"},
                   {"ucx_ep_close_force", "false"},
                   {"engine_config", ""},
                   {"same_host", ""},
                   {"same_host_huge_pages", ""}};
  if (with_engines) params["num_ucx_engines"] = "8";
  return params;
}

std::string device_names(std::string_view text) {
  std::string out;
  std::string spaced(text);
  std::replace(spaced.begin(), spaced.end(), ' ', ',');
  for (std::size_t at = 0; at < spaced.size();) {
    const std::size_t end = std::min(spaced.find(',', at), spaced.size());
    std::string name = spaced.substr(at, end - at);
    at = end + 1;
    if (name.empty()) continue;
    // Ports exist on RDMA devices only; "all", patterns and network interfaces have none.
    std::error_code ignored;
    const bool plain = name != "all" && name.find_first_of(":*^") == std::string::npos;
    if (plain && !std::filesystem::exists("/sys/class/net/" + name, ignored)) name += ":1";
    out += (out.empty() ? "" : ",") + name;
  }
  return out;
}

Result<Options> parse_options(const Params& params) {
  Options options;
  NIXL_ASSIGN(const auto workers, int_param(params, "num_workers", 1, 1, 64));
  NIXL_ASSIGN(const auto threads, int_param(params, "num_threads", 0, 0, 64));
  NIXL_ASSIGN(const auto split, int_param(params, "split_batch_size", 1024, 1, 1 << 30));
  NIXL_TRY(int_param(params, "ucx_num_device_channels", 4, 1, 1024).map([](auto) {}));
  options.num_workers = static_cast<int>(workers);
  options.num_threads = static_cast<int>(threads);
  options.split_batch_size = static_cast<std::uint64_t>(split);

  const std::string& mode = value_of(params, "ucx_error_handling_mode");
  if (!mode.empty() && mode != "peer" && mode != "none")
    return fail(Code::kInvalidArgument, "UCX parameter ucx_error_handling_mode = '%s': 'peer' or 'none' is needed",
                mode.c_str());
  options.peer_errors = mode != "none";
  const std::string& force = value_of(params, "ucx_ep_close_force");
  if (!force.empty()) {
    const auto value = parse_bool(force);
    if (!value)
      return fail(Code::kInvalidArgument, "UCX parameter ucx_ep_close_force = '%s': true or false is needed",
                  force.c_str());
    options.force_close = *value;
  }
  NIXL_TRY(parse_engine_config(value_of(params, "engine_config"), options));
  for (const auto& [key, value] : params) {
    if (!key.starts_with("UCX_") || value.empty()) continue;
    if (key == "UCX_NET_DEVICES")
      options.devices = value;
    else
      options.entries.emplace_back(without_prefix(key), value);
  }
  for (const char* key : {"ucx_devices", "device_list"})
    if (const std::string& value = value_of(params, key); !value.empty()) options.devices = device_names(value);
  return options;
}

Result<ucp_config_t*> make_config(const Api& api, const Options& options) {
  ucp_config_t* config = nullptr;
  if (const ucs_status_t status = api.config_read(nullptr, nullptr, &config); status != UCS_OK)
    return fail(ucx_error(api, "UCX environment variables (UCX_*)", status, Code::kInvalidArgument));
  const auto in_environment = [](const std::string& key) { return std::getenv(("UCX_" + key).c_str()) != nullptr; };

  for (const auto& [key, value] : own_defaults(api))
    if (!in_environment(key)) (void)api.config_modify(config, key.c_str(), value.c_str());  // older UCX: key unknown
  for (const auto& [key, value] : options.entries) {
    if (in_environment(key)) {
      NIXL_INFO("UCX_%s=%s of the environment is used instead of the parameter's '%s'", key.c_str(),
                std::getenv(("UCX_" + key).c_str()), value.c_str());
      continue;
    }
    const ucs_status_t status = api.config_modify(config, key.c_str(), value.c_str());
    if (status == UCS_ERR_NO_ELEM) {
      NIXL_WARN("UCX has no configuration entry '%s'; it is ignored", key.c_str());
    } else if (status != UCS_OK) {
      api.config_release(config);
      return fail(
          ucx_error(api, "UCX configuration entry " + key + " = '" + value + "'", status, Code::kInvalidArgument));
    }
  }
  if (!options.devices.empty()) {
    if (const ucs_status_t status = api.config_modify(config, "NET_DEVICES", options.devices.c_str());
        status != UCS_OK) {
      api.config_release(config);
      return fail(ucx_error(api, "UCX devices '" + options.devices + "'", status, Code::kInvalidArgument));
    }
  }
  return config;
}

}  // namespace nixl::core::ucx
