#include "backends/gpunetio/needs.h"

#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "device/staging/gpu_driver.h"

namespace nixl::core::gpunetio {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLibraries[] = {"libdoca_gpunetio.so", "libdoca_verbs.so", "libdoca_common.so", "libibverbs.so.1",
                                      "libmlx5.so.1"};

Result<void> open_library(const char* soname) {
  if (::dlopen(soname, RTLD_LAZY | RTLD_LOCAL)) return {};  // kept open: some leave memory behind when they are closed
  const char* error = ::dlerror();
  if (error && std::string_view(error).starts_with(soname)) return fail(Code::kUnsupported, "%s", error);
  return fail(Code::kUnsupported, "%s cannot be opened: %s", soname, error ? error : "the loader gives no reason");
}

// The open kernel module shares GPU memory with adapters as dma-buf, the proprietary one only through nvidia-peermem.
bool has_dma_buf(const Machine& machine) {
  std::ifstream file(machine.driver_file);
  std::string line;
  std::getline(file, line);
  return line.find("Open Kernel Module") != std::string::npos;
}

}  // namespace

Machine Machine::this_one() {
  Machine machine;
  machine.cuda = [] { return GpuDriver::probe(); };
  machine.library = open_library;
  return machine;
}

std::vector<std::string> mlx5_devices(const Machine& machine) {
  std::vector<std::string> names;
  std::error_code ignored;
  for (const auto& device : fs::directory_iterator(machine.rdma_folder, ignored)) {
    const fs::path driver = fs::read_symlink(device.path() / "device/driver", ignored);
    if (driver.filename() == "mlx5_core") names.push_back(device.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> missing(const Machine& machine) {
  std::vector<std::string> lines;
  if (const auto cuda = machine.cuda(); !cuda) lines.push_back("no CUDA device: " + cuda.error().reason);
  for (const char* soname : kLibraries)
    if (const auto opened = machine.library(soname); !opened) lines.push_back(opened.error().reason);
  if (mlx5_devices(machine).empty()) lines.push_back("no mlx5 device in " + machine.rdma_folder);
  std::error_code ignored;
  if (!fs::exists(machine.peermem_folder, ignored) && !has_dma_buf(machine))
    lines.push_back("neither nvidia-peermem (no " + machine.peermem_folder +
                    "; modprobe nvidia-peermem) nor dma-buf (" + machine.driver_file + " names no open kernel module)");
  return lines;
}

}  // namespace nixl::core::gpunetio
