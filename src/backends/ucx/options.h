// The backend's parameters, and their translation into UCX's configuration.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "backends/ucx/library.h"
#include "contract/memory.h"

namespace nixl::core::ucx {

struct Options {
  int num_workers = 1;                    // independent progress engines, each with its own connection to a peer
  int num_threads = 0;                    // as many workers more, each with a thread; large requests are shared out
  std::uint64_t split_batch_size = 1024;  // a request of more pieces is large
  bool peer_errors = true;                // ucx_error_handling_mode = peer
  bool force_close = false;               // endpoints are dropped without flushing
  std::string devices;                    // NET_DEVICES in UCX's words, empty: all
  std::vector<std::pair<std::string, std::string>> entries;  // UCX configuration keys without "UCX_", in order given
};

// Defaults shown to users.
Params default_params(bool with_engines);

// kInvalidArgument names the parameter, the value and what is allowed.
Result<Options> parse_options(const Params& params);

// "mlx5_0, mlx5_1:2" -> "mlx5_0:1,mlx5_1:2"; names that are no RDMA device ("eth0") stay as they are.
std::string device_names(std::string_view text);

// A ucp_config_t with, from weak to strong: UCX's defaults, ours, the caller's entries, the process environment,
// `devices`. The caller releases it. The environment is read and never changed.
Result<ucp_config_t*> make_config(const Api& api, const Options& options);

}  // namespace nixl::core::ucx
