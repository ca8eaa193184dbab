// What one plain kernel gives that copies a whole descriptor list between two GPUs of one process, random order on both
// sides; and what the copy engine gives. Time from launch to a host-visible word. Prints one JSON object: GB/s by case.
// A list's columns are source and destination offsets in pinned host memory; a warp reads 32 of them at once and copies
// 4 KiB pieces with 16-byte accesses.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "check.cuh"

struct List {
  std::uint8_t* to;
  const std::uint8_t* from;
  const std::uint64_t *from_offset, *to_offset;
  std::uint32_t count, length, piece;
  unsigned *left, *done;
  unsigned epoch;
};

__global__ void __launch_bounds__(512) list_copy(List list) {
  const int lane = threadIdx.x & 31, warps = gridDim.x * (blockDim.x / 32);
  const std::uint32_t per = list.length / list.piece;
  const std::uint64_t total = std::uint64_t{list.count} * per;
  for (std::uint64_t base = std::uint64_t(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * 32; base < total;
       base += std::uint64_t(warps) * 32) {
    const std::uint64_t mine = base + lane;
    std::uint64_t s = 0, d = 0;
    if (mine < total) {
      s = list.from_offset[mine / per] + mine % per * list.piece;
      d = list.to_offset[mine / per] + mine % per * list.piece;
    }
    const int here = static_cast<int>(min(std::uint64_t{32}, total - base));
    for (int q = 0; q < here; ++q) {
      const uint4* a = reinterpret_cast<const uint4*>(list.from + __shfl_sync(~0u, s, q));
      uint4* b = reinterpret_cast<uint4*>(list.to + __shfl_sync(~0u, d, q));
      for (std::uint32_t c = lane; c < list.piece / 16; c += 256) {
        uint4 v[8];
#pragma unroll
        for (int u = 0; u < 8; ++u)
          if (c + u * 32 < list.piece / 16) v[u] = __ldcs(a + c + u * 32);
#pragma unroll
        for (int u = 0; u < 8; ++u)
          if (c + u * 32 < list.piece / 16) __stcs(b + c + u * 32, v[u]);
      }
    }
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0 && atomicSub(list.left, 1) == 1) {
    *list.left = gridDim.x;
    __threadfence_system();
    *static_cast<volatile unsigned*>(list.done) = list.epoch;
  }
}

int main(int argc, char** argv) {
  const unsigned blocks = argc > 1 ? static_cast<unsigned>(std::atoi(argv[1])) : 64;
  constexpr std::size_t kBytes = std::size_t{1} << 30;
  int devices = 0;
  CK(cudaGetDeviceCount(&devices));
  const int other = devices > 1 ? 1 : 0;
  std::uint8_t *near, *far;
  CK(cudaSetDevice(other));
  if (other) CK(cudaDeviceEnablePeerAccess(0, 0));
  CK(cudaMalloc(&far, kBytes));
  CK(cudaMemset(far, 1, kBytes));
  CK(cudaSetDevice(0));
  if (other) CK(cudaDeviceEnablePeerAccess(other, 0));
  CK(cudaMalloc(&near, kBytes));
  CK(cudaMemset(near, 0, kBytes));
  unsigned *left, *done, epoch = 0;
  CK(cudaMalloc(&left, 4));
  CK(cudaMemcpy(left, &blocks, 4, cudaMemcpyHostToDevice));
  CK(cudaHostAlloc(&done, 4, cudaHostAllocMapped));
  *done = 0;
  cudaStream_t stream;
  CK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto median = [&](auto&& body) {
    std::vector<double> seconds;
    for (int i = 0; i < 15; ++i) {
      CK(cudaStreamSynchronize(stream));
      const auto start = std::chrono::steady_clock::now();
      body();
      seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::sort(seconds.begin(), seconds.end());
    return seconds[7];
  };
  std::printf("{\"devices\": %d", devices);
  for (const bool read : {false, true}) {
    const double seconds = median([&] {
      CK(cudaMemcpyAsync(read ? near : far, read ? far : near, kBytes, cudaMemcpyDefault, stream));
      CK(cudaStreamSynchronize(stream));
    });
    std::printf(", \"engine %s\": %.2f", read ? "READ" : "WRITE", kBytes / seconds / 1e9);
  }
  const struct {
    std::uint32_t count, length;
  } cases[] = {{1, 1u << 30}, {1000, 65536}, {10000, 16384}, {100000, 4096}, {100000, 1024}};
  for (const auto& [count, length] : cases) {
    std::uint64_t *from, *to;
    CK(cudaHostAlloc(&from, count * 8, cudaHostAllocMapped));
    CK(cudaHostAlloc(&to, count * 8, cudaHostAllocMapped));
    std::vector<std::uint64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 random(1);
    for (std::uint64_t* side : {from, to}) {
      std::shuffle(order.begin(), order.end(), random);
      for (std::uint32_t i = 0; i < count; ++i) side[i] = order[i] * length;
    }
    for (const bool read : {false, true}) {
      const double seconds = median([&] {
        List list{read ? near : far,
                  read ? far : near,
                  from,
                  to,
                  count,
                  length,
                  std::min<std::uint32_t>(length, count == 1 ? 16384 : 4096),
                  left,
                  done,
                  ++epoch};
        list_copy<<<blocks, 512, 0, stream>>>(list);
        while (*static_cast<volatile unsigned*>(done) != epoch) {
        }
      });
      CK(cudaGetLastError());
      std::printf(", \"%ux%u %s\": %.2f", count, length, read ? "READ" : "WRITE",
                  double(count) * length / seconds / 1e9);
    }
    CK(cudaFreeHost(from));
    CK(cudaFreeHost(to));
  }
  std::printf("}\n");
}
