#include "backends/samehost/cuda/driver.h"

#include <dlfcn.h>

#include <mutex>

namespace nixl::core::samehost {
namespace {

#define NIXL_TEXT2(x) #x
#define NIXL_TEXT(x) NIXL_TEXT2(x)
// The toolkit's macros turn a name into the one with its version, as it is exported.
#define NIXL_LOAD(member, function)                                                                 \
  driver.member = reinterpret_cast<decltype(driver.member)>(::dlsym(library, NIXL_TEXT(function))); \
  if (!driver.member) return fail(Code::kUnsupported, "libcuda.so.1 has no %s (driver too old)", NIXL_TEXT(function))

Result<void> load(Driver& driver) {
  void* const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return fail(Code::kUnsupported, "the CUDA driver is missing: %s", ::dlerror());
  NIXL_LOAD(get_error_string, cuGetErrorString);
  NIXL_LOAD(pointer_get_attribute, cuPointerGetAttribute);
  NIXL_LOAD(pointer_get_attributes, cuPointerGetAttributes);
  NIXL_LOAD(get_address_range, cuMemGetAddressRange);
  NIXL_LOAD(retain_handle, cuMemRetainAllocationHandle);
  NIXL_LOAD(export_handle, cuMemExportToShareableHandle);
  NIXL_LOAD(import_handle, cuMemImportFromShareableHandle);
  NIXL_LOAD(release, cuMemRelease);
  NIXL_LOAD(reserve, cuMemAddressReserve);
  NIXL_LOAD(free_address, cuMemAddressFree);
  NIXL_LOAD(map, cuMemMap);
  NIXL_LOAD(unmap, cuMemUnmap);
  NIXL_LOAD(set_access, cuMemSetAccess);
  NIXL_LOAD(get_uuid, cuDeviceGetUuid);
  NIXL_LOAD(write_value, cuStreamWriteValue32);
  int count = 0;
  if (const cudaError_t code = ::cudaGetDeviceCount(&count); code != cudaSuccess || count == 0)
    return fail(Code::kUnsupported, "no usable CUDA device: %s", ::cudaGetErrorString(code));
  return {};
}

}  // namespace

Result<const Driver*> Driver::get() {
  static std::mutex mutex;
  static Driver driver;
  static bool loaded = false;
  std::lock_guard lock(mutex);
  if (!loaded) {
    NIXL_TRY(load(driver));
    loaded = true;
  }
  return &driver;
}

tl::unexpected<Error> cuda_error(const char* what, CUresult code) {
  const char* text = nullptr;
  if (const auto driver = Driver::get()) (*driver)->get_error_string(code, &text);
  return fail(Code::kIo, "%s: CUDA driver error %d (%s)", what, static_cast<int>(code), text ? text : "unknown");
}

tl::unexpected<Error> cuda_error(const char* what, cudaError_t code) {
  return fail(Code::kIo, "%s: CUDA error %d (%s)", what, static_cast<int>(code), ::cudaGetErrorString(code));
}

}  // namespace nixl::core::samehost
