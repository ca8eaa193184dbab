// Which of libfabric's providers is used, and its rails: one for each network device.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "backends/libfabric/library.h"

namespace nixl::core::libfabric {

struct FreeInfo {
  const Api* api = nullptr;
  void operator()(fi_info* info) const { api->freeinfo(info); }
};
using Info = std::unique_ptr<fi_info, FreeInfo>;

struct Provider {
  std::string name;         // "efa", "tcp;ofi_rxm"
  std::vector<Info> rails;  // at least one
  // Completions of writes say that the data is in the target's memory. Otherwise only messages sent afterwards over the
  // same rail say so, and there is one rail.
  bool delivery_complete = true;
  bool device_memory = false;  // FI_HMEM
};

// `asked`: "auto" or a provider's name ("tcp" stands also for "tcp;ofi_rxm"). kUnsupported: nothing that can move memory
// one-sided over reliable datagram endpoints; the reason lists the providers there are. `device_memory`: FI_HMEM is taken
// where the provider has it and libfabric was built for CUDA.
Result<Provider> choose_provider(const Api& api, const std::string& asked, bool device_memory);

}  // namespace nixl::core::libfabric
