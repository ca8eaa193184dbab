#include "backends/gds/cufile.h"

#include <dlfcn.h>
#include <unistd.h>

#include <mutex>
#include <vector>

#include "base/env.h"

namespace nixl::core::gds {
namespace {

constexpr int kAllowCompatibility = 1;  // CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE
constexpr int kForceCompatibility = 2;  // CUFILE_PARAM_FORCE_COMPAT_MODE
constexpr int kFirstError = 5000, kDriverMissing = 5001, kDriverOpenAlready = 5026;

bool has_kernel_driver() {
  return ::access("/proc/driver/nvidia-fs/stats", F_OK) == 0;
}

// Where this library lies, so that a cuFile of the same Python environment is found.
std::string own_folder() {
  Dl_info info;
  if (::dladdr(reinterpret_cast<const void*>(&own_folder), &info) == 0 || !info.dli_fname) return "";
  const std::string path = info.dli_fname;
  return path.substr(0, path.rfind('/'));
}

Result<void*> open_one_of(const char* variable, const std::vector<std::string>& places, const char* hint) {
  std::string tried;
  std::vector<std::string> names = places;
  if (const auto given = env_text(variable)) names = {*given};
  for (const std::string& name : names) {
    if (void* handle = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) return handle;
    const char* error = ::dlerror();
    tried += (tried.empty() ? "" : "; ") + std::string(error ? error : name.c_str());
    if (names.size() > 1 && tried.size() > 160) break;
  }
  return fail(Code::kUnsupported, "%s cannot be opened (%s)%s; %s names another file", places.front().c_str(),
              tried.c_str(), hint, variable);
}

template <typename F>
bool find(void* library, const char* name, F& into) {
  into = reinterpret_cast<F>(::dlsym(library, name));
  return into != nullptr;
}

Result<Cufile> open_libraries() {
  Cufile c;
  auto driver = GpuDriver::load();
  if (!driver)
    return fail(driver.error().code, "%s; for GPUDirect Storage see ls /usr/local/cuda/gds/",
                driver.error().reason.c_str());
  c.driver = *driver;
  const std::string site = own_folder() + "/../../nvidia/";
  NIXL_ASSIGN(void* const cufile, open_one_of("NIXL_CUFILE_LIBRARY",
                                              {"libcufile.so.0", "/usr/local/cuda/lib64/libcufile.so.0",
                                               site + "cufile/lib/libcufile.so.0", site + "cu13/lib/libcufile.so.0"},
                                              "; see ls /usr/local/cuda/gds/, or pip install nvidia-cufile"));
  const bool all =
      find(cufile, "cuFileDriverOpen", c.driver_open) & find(cufile, "cuFileDriverGetProperties", c.driver_properties) &
      find(cufile, "cuFileHandleRegister", c.register_file) &
      find(cufile, "cuFileHandleDeregister", c.deregister_file) & find(cufile, "cuFileBufRegister", c.register_buffer) &
      find(cufile, "cuFileBufDeregister", c.deregister_buffer) & find(cufile, "cuFileRead", c.read) &
      find(cufile, "cuFileWrite", c.write) & find(cufile, "cuFileBatchIOSetUp", c.batch_setup) &
      find(cufile, "cuFileBatchIOSubmit", c.batch_submit) & find(cufile, "cuFileBatchIOGetStatus", c.batch_status) &
      find(cufile, "cuFileBatchIODestroy", c.batch_destroy);
  if (!all) {
    const char* error = ::dlerror();
    return fail(Code::kUnsupported, "libcufile.so.0 is too old: %s", error ? error : "a function is missing");
  }
  find(cufile, "cuFileSetParameterBool", c.set_flag);
  return c;
}

}  // namespace

Result<const Cufile*> Cufile::load() {
  static const Result<Cufile> loaded = open_libraries();
  if (!loaded) return fail(loaded.error());
  return &*loaded;
}

Result<std::string> Cufile::start() const {
  static std::mutex mutex;
  static std::string mode;
  const std::lock_guard lock(mutex);
  if (!mode.empty()) return mode;
  NIXL_TRY(driver->start());
  // Without nvidia-fs cuFile goes through host memory, if it is allowed to; asked for here so that no file must be
  // edited. Forced, it does not look for what direct storage would need.
  if (set_flag) {
    set_flag(kAllowCompatibility, true);
    if (!has_kernel_driver()) set_flag(kForceCompatibility, true);
  }
  const CufileError opened = driver_open();
  if (opened.error != 0 && opened.error != kDriverOpenAlready)
    return fail(
        Code::kUnsupported, "cuFileDriverOpen: %s%s", text_of(opened).c_str(),
        opened.error == kDriverMissing ? "; set CUFILE_ALLOW_COMPAT_MODE=true, or load the module nvidia_fs" : "");
  DriverProperties properties = {};
  const bool known = driver_properties(&properties).error == 0;
  mode = known && properties.nvfs_major > 0 && has_kernel_driver() ? "nvidia-fs" : "compatibility";
  return mode;
}

std::string Cufile::remark() {
  if (has_kernel_driver()) return "";
  return "compatibility mode: the kernel driver nvidia-fs is not loaded (no /proc/driver/nvidia-fs), so files go "
         "through "
         "host memory";
}

std::string Cufile::text_of(CufileError error) {
  struct Known {
    int offset;
    const char* text;
  };
  constexpr Known kKnown[] = {{1, "nvidia-fs driver is not loaded"},
                              {4, "nvidia-fs driver version mismatch"},
                              {7, "GPUDirect Storage not supported on this platform"},
                              {8, "GPUDirect Storage not supported on this file"},
                              {9, "GPUDirect Storage not supported on this GPU"},
                              {11, "CUDA driver error"},
                              {12, "invalid device pointer"},
                              {13, "invalid memory type"},
                              {14, "pointer range exceeds the allocation"},
                              {15, "CUDA context mismatch"},
                              {18, "unsupported file type"},
                              {19, "unsupported open flags"},
                              {20, "the file is not open with O_DIRECT"},
                              {22, "invalid argument"},
                              {25, "permission denied"},
                              {27, "file descriptor is not registered"},
                              {28, "file descriptor is already registered"},
                              {30, "internal error"},
                              {34, "disabled by configuration on this file"},
                              {37, "batch is full"},
                              {44, "I/O error"}};
  std::string text = "cuFile error " + std::to_string(error.error);
  for (const Known& known : kKnown)
    if (kFirstError + known.offset == error.error) text += std::string(" (") + known.text + ")";
  if (error.cuda_error != 0) text += ", CUDA error " + std::to_string(error.cuda_error);
  return text;
}

}  // namespace nixl::core::gds
