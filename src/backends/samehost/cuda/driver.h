// The driver functions of this backend, found in libcuda.so.1 when the first GPU region appears, and errors as text.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include "base/result.h"

namespace nixl::core::samehost {

struct Driver {
  decltype(&::cuGetErrorString) get_error_string = nullptr;
  decltype(&::cuPointerGetAttribute) pointer_get_attribute = nullptr;
  decltype(&::cuPointerGetAttributes) pointer_get_attributes = nullptr;
  decltype(&::cuMemGetAddressRange) get_address_range = nullptr;
  decltype(&::cuMemRetainAllocationHandle) retain_handle = nullptr;
  decltype(&::cuMemExportToShareableHandle) export_handle = nullptr;
  decltype(&::cuMemImportFromShareableHandle) import_handle = nullptr;
  decltype(&::cuMemRelease) release = nullptr;
  decltype(&::cuMemAddressReserve) reserve = nullptr;
  decltype(&::cuMemAddressFree) free_address = nullptr;
  decltype(&::cuMemMap) map = nullptr;
  decltype(&::cuMemUnmap) unmap = nullptr;
  decltype(&::cuMemSetAccess) set_access = nullptr;
  decltype(&::cuDeviceGetUuid) get_uuid = nullptr;
  decltype(&::cuStreamWriteValue32) write_value = nullptr;

  // Loads and initialises the driver once a process; kUnsupported names what is missing.
  static Result<const Driver*> get();
};

tl::unexpected<Error> cuda_error(const char* what, CUresult code);
tl::unexpected<Error> cuda_error(const char* what, cudaError_t code);

// Makes a device current for this thread, and the one from before again at the end.
class DeviceScope {
 public:
  explicit DeviceScope(int device) noexcept : device_(device) {
    if (::cudaGetDevice(&before_) != cudaSuccess) before_ = -1;
    ::cudaSetDevice(device);  // also when it is the current one: this thread may not have its context yet
  }
  ~DeviceScope() {
    if (before_ >= 0 && before_ != device_) ::cudaSetDevice(before_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  const int device_;
  int before_ = -1;
};

}  // namespace nixl::core::samehost

#define NIXL_CUDA_TRY(call)                                                \
  do {                                                                     \
    if (const auto nixl_code = (call); nixl_code != decltype(nixl_code){}) \
      return ::nixl::core::samehost::cuda_error(#call, nixl_code);         \
  } while (0)
