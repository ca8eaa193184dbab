// The second process of the GPU tests and the GPU benchmark of this backend: it owns memory of a kind, and fills and
// shows it.
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <string>

#include "backends/samehost/test_process.h"

namespace vram_peer {

using namespace nixl::core;
using samehost::test::at;
using samehost::test::open_backend;
using samehost::test::read_text;
using samehost::test::send_text;

inline std::size_t kBytes = std::size_t{64} << 20;  // of each side; set before the first use
inline char* mirror;  // shared with the second process: what its GPU memory holds or shall hold

#define CUDA(call)                                                                                       \
  do {                                                                                                   \
    if (const auto code = (call); static_cast<int>(code) != 0)                                           \
      check::failed(__FILE__, __LINE__, #call ": CUDA error " + std::to_string(static_cast<int>(code))); \
  } while (0)

inline void need_gpu() {
  if (!::opendir("/proc/driver/nvidia/gpus")) SKIP("no GPU: /proc/driver/nvidia/gpus is missing");
}

template <typename F>
F driver(const char* name) {
  static void* const library = ::dlopen("libcuda.so.1", RTLD_NOW);
  CHECK(library != nullptr);
  return reinterpret_cast<F>(::dlsym(library, name));
}
#define DRIVER(name) driver<decltype(&::name)>(#name)

// kBytes of GPU memory: 'p' cudaMalloc, 'v' one virtual allocation, 'e' several neighbouring ones as expandable
// segments are.
inline char* allocate(char kind, int device) {
  CUDA(::cudaSetDevice(device));
  CUDA(::cudaFree(nullptr));
  void* plain = nullptr;
  if (kind == 'p') {
    CUDA(::cudaMalloc(&plain, kBytes));
    return static_cast<char*>(plain);
  }
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  const std::size_t step = kind == 'v' ? kBytes : std::size_t{4} << 20;
  CUdeviceptr base = 0;
  CUDA(DRIVER(cuMemAddressReserve)(&base, kBytes, 0, 0, 0));
  for (std::size_t at = 0; at < kBytes; at += step) {
    CUmemGenericAllocationHandle handle;
    CUDA(DRIVER(cuMemCreate)(&handle, step, &properties, 0));
    CUDA(DRIVER(cuMemMap)(base + at, step, 0, handle, 0));
    CUDA(DRIVER(cuMemRelease)(handle));
  }
  CUmemAccessDesc access{properties.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  CUDA(DRIVER(cuMemSetAccess)(base, kBytes, &access, 1));
  return reinterpret_cast<char*>(base);
}

// kBytes of a new memory file; 's': sealed against shrinking.
inline char* map_file(char kind, int& file) {
  file = ::memfd_create("vram_peer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK(file >= 0);
  CHECK_EQ(::ftruncate(file, static_cast<off_t>(kBytes)), 0);
  if (kind == 's') CHECK_EQ(::fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK), 0);
  void* const memory = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  CHECK(memory != MAP_FAILED);
  return static_cast<char*>(memory);
}

// Kind 'h': host memory that no other process can map (the mirror itself); 's': a memory file that cannot shrink, 'u': one
// that can.
struct Target {
  explicit Target(char kind) : kind(kind) {
    int ends[2];
    CHECK_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    pid = ::fork();
    if (pid == 0) {
      ::close(ends[0]);
      ::alarm(200);
      serve(ends[1]);
      ::_exit(0);
    }
    ::close(ends[1]);
    fd = ends[0];
    connection = read_text(fd);
    key = read_text(fd);
    spare_key = read_text(fd);
  }
  ~Target() {
    if (pid > 0) ::kill(pid, SIGKILL), ::waitpid(pid, nullptr, 0);
    ::close(fd);
  }
  void serve(int fd) {
    int count = 0;
    if (!is_host()) CUDA(::cudaGetDeviceCount(&count));
    const int device = count > 1 ? 1 : 0;
    int file = -1;
    char* const memory = kind == 'h' ? mirror : is_host() ? map_file(kind, file) : allocate(kind, device);
    Region mine{is_host() ? MemKind::kDram : MemKind::kVram, at(memory), kBytes, static_cast<std::uint64_t>(device),
                ""};
    auto backend = open_backend("target");
    auto own = std::move(*CHECK_OK(backend->add_region(mine)));
    auto spare = std::move(*CHECK_OK(backend->add_region(mine)));
    auto* words = reinterpret_cast<std::uint64_t*>(mirror + kBytes);
    words[0] = static_cast<std::uint64_t>(mine.kind), words[1] = mine.address, words[2] = mine.device;
    send_text(fd, *CHECK_OK(backend->export_connection()));
    send_text(fd, *CHECK_OK(backend->export_region(*own)));
    send_text(fd, *CHECK_OK(backend->export_region(*spare)));
    for (char what; ::read(fd, &what, 1) == 1; send_text(fd, "")) {
      if (what == 'd') spare.reset();
      if (what == 't') CHECK_EQ(::ftruncate(file, 0), 0);
      if (kind == 'h' || (what != 'w' && what != 'r')) continue;
      char *to = memory, *from = mirror;
      if (what == 'r') std::swap(to, from);
      if (is_host())
        std::memcpy(to, from, kBytes);
      else
        CUDA(::cudaMemcpy(to, from, kBytes, cudaMemcpyDefault));
    }
  }
  // 'w': takes the mirror over, 'r': shows its memory there, 'd': deregisters the spare region, 't': truncates its file.
  void ask(char what) {
    CHECK_EQ(::write(fd, &what, 1), 1);
    read_text(fd);
  }
  bool is_host() const { return std::strchr("hsu", kind) != nullptr; }
  char kind;
  pid_t pid;
  int fd;
  std::string connection, key, spare_key;
};

}  // namespace vram_peer
