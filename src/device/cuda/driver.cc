#include "device/cuda/driver.h"

namespace nixl::core {
namespace {

template <typename Function>
bool find(const char* name, Function& function) {
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found;
  // 12.0: the newest versions of these functions are older than that.
  if (cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found) != cudaSuccess ||
      found != cudaDriverEntryPointSuccess)
    return false;
  function = reinterpret_cast<Function>(address);
  return true;
}

std::string why_no_device(cudaError_t status) {
  if (status == cudaSuccess) return "the driver lists none";
  int supported = 0;
  if (cudaDriverGetVersion(&supported) == cudaSuccess && supported == 0)
    return "there is no NVIDIA driver (libcuda.so.1)";
  return cudaGetErrorString(status);
}

Result<CudaDriver> open_driver() {
  int devices = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&devices); status != cudaSuccess || devices == 0) {
    (void)cudaGetLastError();
    return fail(Code::kUnsupported, "no CUDA device: %s", why_no_device(status).c_str());
  }
  CudaDriver driver;
  const bool complete = find("cuGetErrorString", driver.get_error_string) &&
                        find("cuMemGetAllocationGranularity", driver.get_granularity) &&
                        find("cuMemAddressReserve", driver.reserve_addresses) &&
                        find("cuMemAddressFree", driver.free_addresses) && find("cuMemCreate", driver.create) &&
                        find("cuMemRelease", driver.release) && find("cuMemMap", driver.map) &&
                        find("cuMemUnmap", driver.unmap) && find("cuMemSetAccess", driver.set_access) &&
                        find("cuMemExportToShareableHandle", driver.export_handle) &&
                        find("cuMemImportFromShareableHandle", driver.import_handle);
  if (!complete)
    return fail(Code::kUnsupported, "the CUDA driver is too old: virtual memory functions of CUDA 12 are missing");
  return driver;
}

}  // namespace

Result<const CudaDriver*> cuda_driver() {
  static const Result<CudaDriver> driver = open_driver();
  if (!driver) return fail(Error(driver.error()));
  return &*driver;
}

Result<void> cuda_check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return {};
  (void)cudaGetLastError();
  return fail(Code::kIo, "%s: %s (%s)", what, cudaGetErrorString(status), cudaGetErrorName(status));
}
Result<void> cuda_check(CUresult status, const char* what) {
  if (status == CUDA_SUCCESS) return {};
  const char* text = nullptr;
  if (auto driver = cuda_driver(); driver) (*driver)->get_error_string(status, &text);
  return fail(Code::kIo, "%s: %s (CUDA driver error %d)", what, text ? text : "unknown", static_cast<int>(status));
}

DeviceScope::DeviceScope(int device) noexcept {
  (void)cudaThreadExchangeStreamCaptureMode(&mode_);
  int now = -1;
  if (cudaGetDevice(&now) == cudaSuccess && now != device) before_ = now;
  (void)cudaSetDevice(device);
}
DeviceScope::~DeviceScope() {
  if (before_ >= 0) (void)cudaSetDevice(before_);
  (void)cudaThreadExchangeStreamCaptureMode(&mode_);
}

}  // namespace nixl::core
