// The CUDA driver, found when first asked for: the runtime is linked statically and opens libcuda itself, so a library with
// this in it loads on machines without a driver. Thread-safe.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "base/result.h"

namespace nixl::core {

// Driver functions that the runtime has no equivalent for.
struct CudaDriver {
  decltype(&cuGetErrorString) get_error_string = nullptr;
  decltype(&cuMemGetAllocationGranularity) get_granularity = nullptr;
  decltype(&cuMemAddressReserve) reserve_addresses = nullptr;
  decltype(&cuMemAddressFree) free_addresses = nullptr;
  decltype(&cuMemCreate) create = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemExportToShareableHandle) export_handle = nullptr;
  decltype(&cuMemImportFromShareableHandle) import_handle = nullptr;
};

// kUnsupported, with the reason, when there is no driver or no device.
Result<const CudaDriver*> cuda_driver();

Result<void> cuda_check(cudaError_t status, const char* what);
Result<void> cuda_check(CUresult status, const char* what);

// Makes `device` current in this thread for a scope, and lets this thread work while another one captures a graph.
class DeviceScope {
 public:
  explicit DeviceScope(int device) noexcept;
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = -1;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace nixl::core
