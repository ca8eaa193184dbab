// What the parameters of the Mooncake backend and this machine come to.
#pragma once
#include <string>
#include <vector>

#include "backends/mooncake/engine.h"
#include "contract/memory.h"

namespace nixl::core::mooncake {

// What is looked at; tests look elsewhere.
struct Machine {
  std::string rdma_folder = "/sys/class/infiniband";
};

// Our address: NIXL_MOONCAKE_IP_ADDR, else the first interface that is up and no loopback, else 127.0.0.1.
Result<std::string> own_address();

// Protocol, devices and address. Errors name the parameter or the variable.
Result<EngineOptions> engine_options(const Params& params, const Machine& machine = {});

}  // namespace nixl::core::mooncake
