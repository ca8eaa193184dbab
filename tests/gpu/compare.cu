#include "compare.h"

namespace gpu_test {
namespace {

__global__ void rows_kernel(const unsigned* a, const unsigned* b, const std::int32_t* count, int rows, int words,
                            unsigned long long* wrong) {
  const int expert = blockIdx.x, n = count[expert];
  unsigned long long differ = 0;
  for (int row = blockIdx.y; row < n; row += gridDim.y) {
    const std::int64_t at = (std::int64_t{expert} * rows + row) * words;
    for (int i = threadIdx.x; i < words; i += blockDim.x) differ += a[at + i] != b[at + i];
  }
  if (differ) atomicAdd(wrong, differ);
}
__global__ void columns_kernel(const unsigned* a, const unsigned* b, const std::int32_t* count, int rows, int words,
                               unsigned long long* wrong) {
  const int expert = blockIdx.x, n = count[expert];
  unsigned long long differ = 0;
  for (int word = blockIdx.y; word < words; word += gridDim.y) {
    const std::int64_t at = (std::int64_t{expert} * words + word) * rows;
    for (int i = threadIdx.x; i < n; i += blockDim.x) differ += a[at + i] != b[at + i];
  }
  if (differ) atomicAdd(wrong, differ);
}
__global__ void bytes_kernel(const unsigned* a, const unsigned* b, std::int64_t words, unsigned long long* wrong) {
  unsigned long long differ = 0;
  for (std::int64_t i = blockIdx.x * std::int64_t{blockDim.x} + threadIdx.x; i < words;
       i += std::int64_t{gridDim.x} * blockDim.x)
    differ += a[i] != b[i];
  if (differ) atomicAdd(wrong, differ);
}
__global__ void random_pause_kernel(std::uint32_t seed) {
  const std::uint32_t h = (seed ^ static_cast<std::uint32_t>(clock64())) * 2654435761u;
  const long long cycles = h % 50000, begin = clock64();
  while (clock64() - begin < cycles) {
  }
}
__global__ void pause_kernel(std::uint64_t ns) {
  const auto now = [] {
    std::uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
  };
  for (const std::uint64_t end = now() + ns; now() < end;) __nanosleep(100);
}

}  // namespace

void compare_rows(const void* a, const void* b, const std::int32_t* count, int experts, int rows, int row_bytes,
                  unsigned long long* wrong, cudaStream_t stream) {
  rows_kernel<<<dim3(experts, 8), 128, 0, stream>>>(static_cast<const unsigned*>(a), static_cast<const unsigned*>(b),
                                                    count, rows, row_bytes / 4, wrong);
}
void compare_columns(const void* a, const void* b, const std::int32_t* count, int experts, int rows, int words,
                     unsigned long long* wrong, cudaStream_t stream) {
  columns_kernel<<<dim3(experts, 8), 128, 0, stream>>>(static_cast<const unsigned*>(a), static_cast<const unsigned*>(b),
                                                       count, rows, words, wrong);
}
void compare_bytes(const void* a, const void* b, std::int64_t bytes, unsigned long long* wrong, cudaStream_t stream) {
  bytes_kernel<<<64, 128, 0, stream>>>(static_cast<const unsigned*>(a), static_cast<const unsigned*>(b), bytes / 4,
                                       wrong);
}
void pause_randomly(std::uint32_t seed, cudaStream_t stream) {
  random_pause_kernel<<<1, 1, 0, stream>>>(seed);
}
void pause(double us, cudaStream_t stream) {
  pause_kernel<<<1, 1, 0, stream>>>(static_cast<std::uint64_t>(us * 1000));
}

}  // namespace gpu_test
