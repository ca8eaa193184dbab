// What GPUNETIO needs of a machine, and what of it is missing.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "base/result.h"

namespace nixl::core::gpunetio {

// Where it is looked for; tests give other answers.
struct Machine {
  std::function<Result<void>()> cuda;                         // is there a driver and a device
  std::function<Result<void>(const char* soname)> library;    // can it be opened: its name and the loader's words
  std::string rdma_folder = "/sys/class/infiniband";          // a folder for every RDMA device
  std::string peermem_folder = "/sys/module/nvidia_peermem";  // there when the module is loaded
  std::string driver_file = "/proc/driver/nvidia/version";    // names the kind of the kernel module
  std::string network_folder = "/sys/class/net";

  static Machine this_one();
};

std::vector<std::string> mlx5_devices(const Machine& machine);

// One line for each thing that is missing; empty: everything is here.
std::vector<std::string> missing(const Machine& machine);

}  // namespace nixl::core::gpunetio
