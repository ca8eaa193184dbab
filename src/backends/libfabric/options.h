// The backend's parameters.
#pragma once
#include <cstdint>
#include <string>

#include "base/result.h"
#include "contract/memory.h"

namespace nixl::core::libfabric {

struct Options {
  bool own_thread = false;                    // num_threads > 0: a thread of the backend drives it
  std::uint64_t split_batch_size = 1024;      // operations that a transfer posts before others get their turn
  std::uint64_t striping_threshold = 131072;  // bytes from which a piece is cut up over all rails
  std::uint64_t max_gbits_per_segment = 0;    // > 0: so many Gbit/s of rails serve one transfer of DRAM
  std::uint64_t post_queue_size = 32768;      // operations in flight
  std::string provider = "auto";
};

// Defaults shown to users.
Params default_params();

// The value of each parameter; of one that stands at its default, that of NIXL_LIBFABRIC_<NAME IN CAPITALS>.
// kInvalidArgument names the parameter, the value and what is allowed.
Result<Options> parse_options(const Params& params);

}  // namespace nixl::core::libfabric
