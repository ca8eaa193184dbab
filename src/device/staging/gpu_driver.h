// The few calls of the CUDA driver that storage needs, opened at run time, with declarations of our own: it is the same
// with and without a CUDA toolkit at the build. Thread-safe.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/result.h"

namespace nixl::core {

struct GpuDriver {
  int (*init)(unsigned) = nullptr;
  int (*device_count)(int*) = nullptr;
  int (*device)(int*, int) = nullptr;
  int (*retain_context)(void**, int) = nullptr;
  int (*set_context)(void*) = nullptr;
  int (*get_context)(void**) = nullptr;
  int (*exchange_capture_mode)(int*) = nullptr;
  int (*allocate_pinned)(void**, std::size_t, unsigned) = nullptr;
  int (*free_pinned)(void*) = nullptr;
  int (*copy_async)(std::uint64_t to, std::uint64_t from, std::size_t, void* stream) = nullptr;
  int (*create_stream)(void**, unsigned) = nullptr;
  int (*synchronize_stream)(void*) = nullptr;
  int (*error_text)(int, const char**) = nullptr;

  // Opens libcuda.so.1 (or what NIXL_CUDA_LIBRARY names), once a process; initialises nothing. kUnsupported: what was
  // looked for and where.
  static Result<const GpuDriver*> load();
  // Is a GPU to be expected here? As load(), and there is a device node. For probes.
  static Result<void> probe();
  // Initialises the driver, once a process, and returns how many GPUs it has; none is an error.
  Result<int> start() const;
  // Makes the primary context of `gpu` current in the calling thread, and lets the thread work while another one
  // captures a graph. For threads of our own.
  Result<void> use(int gpu) const;

  // "cuMemcpyAsync: CUDA driver error 1 (invalid argument)".
  Result<void> check(int status, const char* what) const;
};

}  // namespace nixl::core
