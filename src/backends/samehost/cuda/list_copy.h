// One kernel copies a whole list. Addresses are what the executing device can reach: its own memory, mapped memory of
// other devices and processes, pinned host memory. Any length and alignment; pieces must not overlap in the
// destination.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace nixl::core::samehost {

inline constexpr std::uint32_t kThreadsPerBlock = 512;

struct ListCopy {
  // Columns of `num_items` entries in pinned host memory.
  const std::uint64_t* source = nullptr;
  const std::uint64_t* destination = nullptr;
  const std::uint32_t* length = nullptr;
  std::uint64_t num_items = 0;
  std::uint32_t num_blocks = 0;          // of the grid
  std::uint32_t* blocks_done = nullptr;  // device memory; holds 0 before and after
  std::uint32_t* done = nullptr;         // pinned host memory; becomes `epoch` once every byte is visible everywhere
  std::uint32_t epoch = 0;
};

cudaError_t launch_list_copy(const ListCopy& copy, cudaStream_t stream);
// Sets `done` when everything before it on the stream has finished and is visible everywhere. For devices that cannot do
// so without a kernel.
cudaError_t launch_signal(std::uint32_t* done, std::uint32_t epoch, cudaStream_t stream);

}  // namespace nixl::core::samehost
