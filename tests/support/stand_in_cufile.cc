// Stands in for libcufile.so.0 and libcuda.so.1: "GPU memory" is host memory, files are read and written by pread and
// pwrite. STAND_IN_FAULT makes it misbehave: "short" moves at most 1000 bytes a call, "entry" fails the third entry of
// a batch, "driver" refuses to start, "io" answers every call with EIO, "file" refuses to register files, "copy" fails
// every copy between GPU and host.
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <vector>

namespace {
struct Error {
  int error, cuda_error;
};
struct Description {
  int type;
  union {
    int fd;
    void* handle;
  };
  const void* operations;
};
struct Entry {
  int mode;
  struct {
    char* base;
    off_t file_offset, base_offset;
    size_t size;
  } io;
  void* file;
  int write;
  void* cookie;
};
struct Event {
  void* cookie;
  int status;
  size_t result;
};
using Batch = std::vector<Event>;

bool fault(const char* name) {
  const char* wanted = std::getenv("STAND_IN_FAULT");
  return wanted && std::strcmp(wanted, name) == 0;
}
int fd_of(void* file) {
  return static_cast<int>(reinterpret_cast<long>(file)) - 1;
}
ssize_t run(bool write, void* file, char* memory, size_t size, off_t offset) {
  if (fault("io")) {
    errno = EIO;
    return -1;
  }
  if (fault("short")) size = std::min<size_t>(size, 1000);
  return write ? ::pwrite(fd_of(file), memory, size, offset) : ::pread(fd_of(file), memory, size, offset);
}
}  // namespace

extern "C" {
Error cuFileDriverOpen() {
  return {fault("driver") ? 5001 : 0, 0};
}
Error cuFileDriverGetProperties(void* properties) {
  std::memset(properties, 0, 64);
  return {0, 0};
}
Error cuFileHandleRegister(void** file, Description* description) {
  if (fault("file")) return {5027, 0};
  *file = reinterpret_cast<void*>(static_cast<long>(description->fd) + 1);
  return {0, 0};
}
void cuFileHandleDeregister(void*) {}
Error cuFileBufRegister(const void*, size_t, int) {
  return {0, 0};
}
Error cuFileBufDeregister(const void*) {
  return {0, 0};
}
ssize_t cuFileRead(void* file, void* base, size_t size, off_t offset, off_t base_offset) {
  return run(false, file, static_cast<char*>(base) + base_offset, size, offset);
}
ssize_t cuFileWrite(void* file, const void* base, size_t size, off_t offset, off_t base_offset) {
  return run(true, file, const_cast<char*>(static_cast<const char*>(base)) + base_offset, size, offset);
}
Error cuFileBatchIOSetUp(void** batch, unsigned) {
  *batch = new Batch;
  return {0, 0};
}
Error cuFileBatchIOSubmit(void* batch, unsigned count, Entry* entries, unsigned) {
  for (unsigned i = 0; i < count; ++i) {
    const Entry& e = entries[i];
    const ssize_t moved = run(e.write, e.file, e.io.base + e.io.base_offset, e.io.size, e.io.file_offset);
    const bool bad = moved < 0 || (fault("entry") && i == 2);
    static_cast<Batch*>(batch)->push_back(
        {e.cookie, bad ? 0x40 : 0x10, bad ? static_cast<size_t>(-5) : static_cast<size_t>(moved)});
  }
  return {0, 0};
}
Error cuFileBatchIOGetStatus(void* batch, unsigned, unsigned* count, Event* events, timespec*) {
  auto& all = *static_cast<Batch*>(batch);
  *count = static_cast<unsigned>(std::min<size_t>({all.size(), *count, 5}));  // a few at a time, the last first
  for (unsigned i = 0; i < *count; ++i, all.pop_back()) events[i] = all.back();
  return {0, 0};
}
void cuFileBatchIODestroy(void* batch) {
  delete static_cast<Batch*>(batch);
}
int cuInit(unsigned) {
  return 0;
}
int cuDeviceGetCount(int* count) {
  return *count = 1, 0;
}
int cuDeviceGet(int* device, int ordinal) {
  return *device = ordinal, 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) {
  return *context = nullptr, 0;
}
int cuCtxSetCurrent(void*) {
  return 0;
}
int cuCtxGetCurrent(void** context) {
  return *context = nullptr, 0;
}
int cuThreadExchangeStreamCaptureMode(int*) {
  return 0;
}
int cuMemHostAlloc(void** buffer, size_t size, unsigned) {
  *buffer = std::aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  return *buffer ? 0 : 2;
}
int cuMemFreeHost(void* buffer) {
  return std::free(buffer), 0;
}
int cuMemcpyAsync(unsigned long long to, unsigned long long from, size_t size, void*) {
  if (fault("copy")) return 700;
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
  return 0;
}
int cuStreamCreate(void** stream, unsigned) {
  return *stream = stream, 0;
}
int cuStreamSynchronize(void*) {
  return 0;
}
int cuGetErrorString(int, const char** text) {
  return *text = "an illegal memory access was encountered", 0;
}
}
