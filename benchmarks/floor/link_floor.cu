// Floor: what the link between GPUs gives to programs that do nothing else. One process, JSON on stdout.
//   stores, engines  every GPU writes 64 MB to every other one at once, by plain stores of one kernel or through its copy engines;
//                    GB/s a GPU, median; rate is the better one
//   hop   half of a round trip of a flag between two GPUs, us, median over all pairs
// Run: link_floor [GPUS]
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "check.cuh"

constexpr size_t kBytes = 64 << 20;
constexpr int kRounds = 9, kCopies = 8, kHops = 1000;

__device__ unsigned load(const unsigned* p) {
  unsigned v;
  asm volatile("ld.relaxed.sys.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ void store(unsigned* p, unsigned v) {
  asm volatile("st.relaxed.sys.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}
// Two of these, on two GPUs: each waits for its flag and answers into the other's. Gives up after a second.
__global__ void bounce(unsigned* own, unsigned* theirs, int first, long long* ns) {
  long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  for (unsigned hop = 1; hop <= kHops; ++hop) {
    if (first) store(theirs, hop);
    while (load(own) != hop) {
      asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
      if (now - begin > 1'000'000'000) return;
    }
    if (!first) store(theirs, hop);
  }
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  *ns = now - begin;
}

struct Targets {
  uint4* at[16];
};
// 4 KB to each target in turn.
__global__ void push(const uint4* source, Targets targets, int count, size_t bytes) {
  constexpr size_t kPiece = 4096 / sizeof(uint4);
  const size_t pieces = bytes / 4096;
  for (size_t piece = blockIdx.x * 4 + threadIdx.x / kPiece; piece < pieces; piece += gridDim.x * 4) {
    const size_t i = piece * kPiece + threadIdx.x % kPiece;
    const uint4 v = source[i];
    for (int t = 0; t < count; ++t) targets.at[(t + piece) % count][i] = v;
  }
}

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

int main(int argc, char** argv) {
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);  // nothing is loaded while a kernel waits for another GPU
  int found = 0;
  if (cudaGetDeviceCount(&found) != cudaSuccess || found < 2) {
    printf("skipped: %d CUDA devices, 2 are needed\n", found);
    return 77;
  }
  const int gpus = argc > 1 ? std::min(atoi(argv[1]), found) : std::min(found, 8);
  std::vector<char*> source(gpus), target(gpus);
  std::vector<unsigned*> flag(gpus);
  std::vector<long long*> ns(gpus);
  std::vector<std::vector<cudaStream_t>> streams(gpus, std::vector<cudaStream_t>(gpus));
  for (int g = 0; g < gpus; ++g) {
    CK(cudaSetDevice(g));
    for (int other = 0; other < gpus; ++other)
      if (other != g) CK(cudaDeviceEnablePeerAccess(other, 0));
    CK(cudaMalloc(&source[g], kBytes));
    CK(cudaMalloc(&target[g], kBytes * gpus));
    CK(cudaMalloc(&flag[g], 256));
    CK(cudaMallocHost(&ns[g], sizeof(long long)));
    CK(cudaMemset(source[g], g, kBytes));
    for (auto& stream : streams[g]) CK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    CK(cudaDeviceSynchronize());
  }
  // GB/s a GPU of kCopies calls of `write` for every GPU.
  const auto rate_of = [&](auto write) {
    std::vector<double> rates;
    for (int round = 0; round < kRounds; ++round) {
      const auto begin = std::chrono::steady_clock::now();
      for (int copy = 0; copy < kCopies; ++copy)
        for (int g = 0; g < gpus; ++g) {
          CK(cudaSetDevice(g));
          write(g);
        }
      for (int g = 0; g < gpus; ++g) {
        CK(cudaSetDevice(g));
        CK(cudaDeviceSynchronize());
      }
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
      if (round > 0) rates.push_back(kBytes * double(gpus - 1) * kCopies / seconds.count() * 1e-9);
    }
    return median(rates);
  };
  const double engines = rate_of([&](int g) {
    for (int other = 0; other < gpus; ++other)
      if (other != g)
        CK(cudaMemcpyAsync(target[other] + kBytes * g, source[g], kBytes, cudaMemcpyDeviceToDevice, streams[g][other]));
  });
  const double stores = rate_of([&](int g) {
    Targets targets;
    for (int i = 1; i < gpus; ++i) {
      const int other = (g + i) % gpus;
      targets.at[i - 1] = reinterpret_cast<uint4*>(target[other] + kBytes * g);
    }
    push<<<264, 1024, 0, streams[g][g]>>>(reinterpret_cast<const uint4*>(source[g]), targets, gpus - 1, kBytes);
    CK(cudaGetLastError());
  });
  std::vector<double> hops;
  for (int a = 0; a < gpus; ++a)
    for (int b = a + 1; b < gpus; ++b)
      for (int turn = 0; turn < 3; ++turn) {
        for (int g : {a, b}) {
          CK(cudaSetDevice(g));
          CK(cudaMemset(flag[g], 0, 256));
          CK(cudaDeviceSynchronize());
          *ns[g] = 0;
        }
        for (int g : {a, b}) {
          CK(cudaSetDevice(g));
          bounce<<<1, 1, 0, streams[g][g]>>>(flag[g], flag[g == a ? b : a], g == a, ns[g]);
          CK(cudaGetLastError());
        }
        for (int g : {a, b}) {
          CK(cudaSetDevice(g));
          CK(cudaDeviceSynchronize());
        }
        // The one that answers starts last, so its time holds no wait for the start of the other.
        if (*ns[b] == 0) {
          fprintf(stderr, "GPUs %d and %d did not hear each other\n", a, b);
          return 1;
        }
        hops.push_back(*ns[b] * 1e-3 / (2 * kHops));
      }
  printf(
      "{\"kind\":\"link\",\"gpus\":%d,\"rate_gb_s\":%.1f,\"stores_gb_s\":%.1f,\"engines_gb_s\":%.1f,\"hop_us\":%.3f}\n",
      gpus, std::max(stores, engines), stores, engines, median(hops));
  return 0;
}
