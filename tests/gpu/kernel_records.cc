#include "kernel_records.h"

#include <cupti.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>

namespace gpu_test {
namespace {

constexpr std::size_t kBufferBytes = 4 << 20;

struct Cupti {
  decltype(&cuptiGetVersion) version = nullptr;
  decltype(&cuptiActivityRegisterCallbacks) callbacks = nullptr;
  decltype(&cuptiActivityEnable) enable = nullptr;
  decltype(&cuptiActivityFlushAll) flush = nullptr;
  decltype(&cuptiActivityGetNextRecord) next = nullptr;
};
Cupti cupti;
std::mutex mutex;  // buffers come back on a thread of CUPTI's
std::vector<KernelRecord> records;

std::string demangled(const char* name) {
  int status = 0;
  char* plain = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string text = status == 0 ? plain : name;
  std::free(plain);
  return text;
}

void CUPTIAPI give_buffer(std::uint8_t** buffer, std::size_t* bytes, std::size_t* most_records) {
  *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *bytes = *buffer ? kBufferBytes : 0;
  *most_records = 0;
}
void CUPTIAPI take_buffer(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t, std::size_t valid) {
  const std::lock_guard lock(mutex);
  CUpti_Activity* record = nullptr;
  while (valid > 0 && cupti.next(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
    const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
    records.push_back({demangled(kernel->name), kernel->start * 1e-3, (kernel->end - kernel->start) * 1e-3});
  }
  std::free(buffer);
}

template <typename F>
bool find(void* library, const char* name, F& function) {
  function = reinterpret_cast<F>(::dlsym(library, name));
  return function != nullptr;
}

}  // namespace

std::string start_recording() {
  const char* named = std::getenv("NIXL_CUPTI");
  void* library = nullptr;
  for (const char* path : {named ? named : "libcupti.so.13", "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so.13",
                           "/usr/local/cuda/lib64/libcupti.so.13"})
    if (!library) library = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) return "libcupti.so.13 was not found; NIXL_CUPTI may name it";
  if (!find(library, "cuptiGetVersion", cupti.version) ||
      !find(library, "cuptiActivityRegisterCallbacks", cupti.callbacks) ||
      !find(library, "cuptiActivityEnable", cupti.enable) || !find(library, "cuptiActivityFlushAll", cupti.flush) ||
      !find(library, "cuptiActivityGetNextRecord", cupti.next))
    return "libcupti.so.13 lacks functions of the activity interface";
  std::uint32_t version = 0;
  if (cupti.version(&version) != CUPTI_SUCCESS || version / 10000 != CUPTI_API_VERSION / 10000)
    return "CUPTI is version " + std::to_string(version) + "; this was built for " + std::to_string(CUPTI_API_VERSION);
  if (const CUptiResult status = cupti.callbacks(give_buffer, take_buffer); status != CUPTI_SUCCESS)
    return "cuptiActivityRegisterCallbacks answers " + std::to_string(status);
  if (const CUptiResult status = cupti.enable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL); status != CUPTI_SUCCESS)
    return "cuptiActivityEnable answers " + std::to_string(status);
  return "";
}

std::vector<KernelRecord> take_records() {
  (void)cupti.flush(0);
  (void)cupti.flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  const std::lock_guard lock(mutex);
  std::vector<KernelRecord> taken;
  taken.swap(records);
  std::sort(taken.begin(), taken.end(),
            [](const KernelRecord& a, const KernelRecord& b) { return a.begin_us < b.begin_us; });
  return taken;
}

}  // namespace gpu_test
