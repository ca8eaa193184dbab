// Kernels of the tests: outputs compared on the device, and pauses.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace gpu_test {

// Adds to *wrong the number of 4-byte words that differ: in the first count[e] rows of [experts, rows, row_bytes], in the first
// count[e] columns of [experts, words, rows], or anywhere.
void compare_rows(const void* a, const void* b, const std::int32_t* count, int experts, int rows, int row_bytes,
                  unsigned long long* wrong, cudaStream_t stream);
void compare_columns(const void* a, const void* b, const std::int32_t* count, int experts, int rows, int words,
                     unsigned long long* wrong, cudaStream_t stream);
void compare_bytes(const void* a, const void* b, std::int64_t bytes, unsigned long long* wrong, cudaStream_t stream);
// Occupies the stream for 0 to 30 us, another time at each run.
void pause_randomly(std::uint32_t seed, cudaStream_t stream);
void pause(double us, cudaStream_t stream);

}  // namespace gpu_test
