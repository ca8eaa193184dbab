// The parameters of GPUNETIO.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "backends/gpunetio/needs.h"
#include "contract/memory.h"

namespace nixl::core::gpunetio {

struct Options {
  std::vector<std::string> network_devices;  // mlx5 devices; one or more
  std::string oob_interface;                 // of the handshake; empty: any
  std::vector<int> gpu_devices;              // CUDA ordinals; one or more
  std::vector<std::uint64_t> cuda_streams;   // handles, at most one for each internal stream; empty: our own
};

inline constexpr std::size_t kNumPostStreams = 4;

// kInvalidArgument names the parameter, its value and what is allowed.
Result<Options> read_options(const Params& params, const Machine& machine);

}  // namespace nixl::core::gpunetio
