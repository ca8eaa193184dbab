#include "device/staging/gpu_driver.h"

#include <dlfcn.h>
#include <unistd.h>

#include <mutex>

#include "base/env.h"

namespace nixl::core {
namespace {

constexpr int kRelaxedCapture = 2;

Result<GpuDriver> open_library() {
  const std::string name = env_text("NIXL_CUDA_LIBRARY").value_or("libcuda.so.1");
  void* const library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* error = ::dlerror();
    return fail(Code::kUnsupported, "%s cannot be opened (%s): no NVIDIA driver; NIXL_CUDA_LIBRARY names another file",
                name.c_str(), error ? error : "no reason given");
  }
  GpuDriver driver;
  const char* missing = nullptr;
  const auto find = [&](const char* symbol, auto& into) {
    into = reinterpret_cast<std::remove_reference_t<decltype(into)>>(::dlsym(library, symbol));
    if (!into) missing = symbol;
  };
  find("cuInit", driver.init);
  find("cuDeviceGetCount", driver.device_count);
  find("cuDeviceGet", driver.device);
  find("cuDevicePrimaryCtxRetain", driver.retain_context);
  find("cuCtxSetCurrent", driver.set_context);
  find("cuCtxGetCurrent", driver.get_context);
  find("cuThreadExchangeStreamCaptureMode", driver.exchange_capture_mode);
  find("cuMemHostAlloc", driver.allocate_pinned);
  find("cuMemFreeHost", driver.free_pinned);
  find("cuMemcpyAsync", driver.copy_async);
  find("cuStreamCreate", driver.create_stream);
  find("cuStreamSynchronize", driver.synchronize_stream);
  find("cuGetErrorString", driver.error_text);
  if (missing) return fail(Code::kUnsupported, "%s has no %s: the driver is too old", name.c_str(), missing);
  return driver;
}

}  // namespace

Result<const GpuDriver*> GpuDriver::load() {
  static const Result<GpuDriver> loaded = open_library();
  if (!loaded) return fail(Error(loaded.error()));
  return &*loaded;
}

Result<void> GpuDriver::probe() {
  const auto loaded = load();
  if (!loaded) return fail(loaded.error());
  if (!env_text("NIXL_CUDA_LIBRARY") && ::access("/dev/nvidiactl", F_OK) != 0)
    return fail(Code::kUnsupported, "no NVIDIA GPU: there is no device node /dev/nvidiactl");
  return {};
}

Result<int> GpuDriver::start() const {
  static std::mutex mutex;
  static int count = 0;
  const std::lock_guard lock(mutex);
  if (count > 0) return count;
  if (const int error = init(0)) return fail(Code::kUnsupported, "libcuda.so.1: cuInit answers error %d", error);
  if (const int error = device_count(&count); error || count == 0)
    return fail(Code::kUnsupported, "libcuda.so.1 finds no GPU (error %d, %d devices)", error, count);
  return count;
}

Result<void> GpuDriver::use(int gpu) const {
  thread_local int current = -1;
  if (gpu == current) return {};
  int device_id = 0, mode = kRelaxedCapture;
  void* context = nullptr;
  NIXL_TRY(check(device(&device_id, gpu), "cuDeviceGet"));
  NIXL_TRY(check(retain_context(&context, device_id), "cuDevicePrimaryCtxRetain"));
  NIXL_TRY(check(set_context(context), "cuCtxSetCurrent"));
  NIXL_TRY(check(exchange_capture_mode(&mode), "cuThreadExchangeStreamCaptureMode"));
  current = gpu;
  return {};
}

Result<void> GpuDriver::check(int status, const char* what) const {
  if (status == 0) return {};
  const char* text = nullptr;
  error_text(status, &text);
  return fail(Code::kIo, "%s: CUDA driver error %d (%s)", what, status, text ? text : "unknown");
}

}  // namespace nixl::core
