// cuFile, opened at run time. The declarations are our own and
// hold what is used; they follow the interface of cuFile 1.x.
#pragma once
#include <sys/types.h>

#include <cstdint>
#include <ctime>
#include <string>

#include "base/result.h"
#include "device/staging/gpu_driver.h"

namespace nixl::core::gds {

struct CufileError {
  int error = 0;       // 0, or 5001 and above
  int cuda_error = 0;  // CUresult where error says so
};
struct FileDescription {  // CUfileDescr_t
  int type = 1;           // an open descriptor
  union {
    int fd;
    void* handle;
  };
  const void* operations = nullptr;
};
using FileHandle = void*;
using BatchHandle = void*;
struct BatchEntry {  // CUfileIOParams_t
  int mode = 1;
  struct {
    void* base;
    off_t file_offset;
    off_t base_offset;
    std::size_t size;
  } io;
  FileHandle file;
  int write;
  void* cookie;
};
struct BatchEvent {  // CUfileIOEvents_t
  void* cookie;
  int status;
  std::size_t result;
};
inline constexpr int kComplete = 0x10, kPending = 0x2, kWaiting = 0x1;
struct DriverProperties {  // CUfileDrvProps_t, of which the first fields matter
  unsigned nvfs_major, nvfs_minor;
  std::size_t poll_threshold, max_direct_bytes;
  unsigned file_systems, control;
  unsigned features;
  unsigned rest[32];
};

struct Cufile {
  CufileError (*driver_open)() = nullptr;
  CufileError (*driver_properties)(DriverProperties*) = nullptr;
  CufileError (*register_file)(FileHandle*, FileDescription*) = nullptr;
  void (*deregister_file)(FileHandle) = nullptr;
  CufileError (*register_buffer)(const void*, std::size_t, int) = nullptr;
  CufileError (*deregister_buffer)(const void*) = nullptr;
  ssize_t (*read)(FileHandle, void*, std::size_t, off_t, off_t) = nullptr;
  ssize_t (*write)(FileHandle, const void*, std::size_t, off_t, off_t) = nullptr;
  CufileError (*batch_setup)(BatchHandle*, unsigned) = nullptr;
  CufileError (*batch_submit)(BatchHandle, unsigned, BatchEntry*, unsigned) = nullptr;
  CufileError (*batch_status)(BatchHandle, unsigned, unsigned*, BatchEvent*, timespec*) = nullptr;
  void (*batch_destroy)(BatchHandle) = nullptr;
  CufileError (*set_flag)(int, bool) = nullptr;  // newer versions only

  const GpuDriver* driver = nullptr;

  // Opens the libraries (once a process, found through NIXL_CUFILE_LIBRARY and NIXL_CUDA_LIBRARY, else under their
  // usual names and places). kUnsupported: what was looked for and where. Initialises nothing.
  static Result<const Cufile*> load();
  // Initialises the driver and cuFile, once a process. The text says how files are reached: "nvidia-fs" or
  // "compatibility".
  Result<std::string> start() const;

  // Where nvidia-fs is missing: that files go through host memory. Else "".
  static std::string remark();
  // "cuFile error 5008 (GPUDirect Storage not supported on current file)".
  static std::string text_of(CufileError error);
};

}  // namespace nixl::core::gds
