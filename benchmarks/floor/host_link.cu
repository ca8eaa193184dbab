// What the link between host memory and each GPU gives: the copy engine from and to page-locked memory, both ways, and
// what page-locking costs. Prints one JSON object: GB/s ("GPU 0 H2D"), and milliseconds to lock and unlock 256 MiB.
#include <cuda_runtime.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "check.cuh"

constexpr std::size_t kBytes = 256 << 20;

template <typename F>
double best_seconds(int times, F&& body) {
  double best = 1e9;
  for (int i = 0; i < times; ++i) {
    const auto start = std::chrono::steady_clock::now();
    body();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

int main() {
  int devices = 0;
  CK(cudaGetDeviceCount(&devices));
  void* host = nullptr;
  CK(cudaHostAlloc(&host, kBytes, cudaHostAllocPortable));
  std::memset(host, 1, kBytes);
  std::printf("{\"devices\": %d", devices);
  for (int device = 0; device < std::min(devices, 2); ++device) {
    CK(cudaSetDevice(device));
    void* memory = nullptr;
    CK(cudaMalloc(&memory, kBytes));
    cudaStream_t stream;
    CK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    for (const bool down : {true, false}) {
      const double seconds = best_seconds(10, [&] {
        CK(cudaMemcpyAsync(down ? memory : host, down ? host : memory, kBytes, cudaMemcpyDefault, stream));
        CK(cudaStreamSynchronize(stream));
      });
      std::printf(", \"GPU %d %s\": %.2f", device, down ? "H2D" : "D2H", kBytes / seconds / 1e9);
    }
    CK(cudaFree(memory));
  }
  void* const plain = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (plain == MAP_FAILED) return 1;
  std::memset(plain, 1, kBytes);
  double unlock = 1e9;
  double lock = 1e9;
  for (int i = 0; i < 3; ++i) {
    lock = std::min(lock, best_seconds(1, [&] { CK(cudaHostRegister(plain, kBytes, cudaHostRegisterDefault)); }));
    unlock = std::min(unlock, best_seconds(1, [&] { CK(cudaHostUnregister(plain)); }));
  }
  std::printf(", \"lock_ms\": %.2f, \"unlock_ms\": %.2f}\n", lock * 1e3, unlock * 1e3);
}
