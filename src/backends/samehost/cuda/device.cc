#include "backends/samehost/cuda/device.h"

#include <algorithm>
#include <bit>

namespace nixl::core::samehost {

PinnedPool::~PinnedPool() {
  for (const auto& [bytes, pieces] : free_)
    for (char* piece : pieces) ::cudaFreeHost(piece);
}

Result<PinnedPool::Piece> PinnedPool::take(std::size_t bytes) {
  const std::size_t rounded = std::bit_ceil(std::max<std::size_t>(bytes, 4096));
  {
    std::lock_guard lock(mutex_);
    if (auto& pieces = free_[rounded]; !pieces.empty()) {
      char* const data = pieces.back();
      pieces.pop_back();
      return Piece(shared_from_this(), data, rounded);
    }
  }
  void* data = nullptr;
  NIXL_CUDA_TRY(::cudaHostAlloc(&data, rounded, cudaHostAllocPortable | cudaHostAllocMapped));
  return Piece(shared_from_this(), static_cast<char*>(data), rounded);
}

void PinnedPool::give_back(char* data, std::size_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  free_[bytes].push_back(data);
}

Result<std::shared_ptr<Device>> Device::open(int ordinal) {
  auto device = std::make_shared<Device>();
  device->ordinal_ = ordinal;
  const DeviceScope scope(ordinal);
  int least = 0, greatest = 0;
  NIXL_CUDA_TRY(::cudaDeviceGetStreamPriorityRange(&least, &greatest));
  for (cudaStream_t& stream : device->streams_)
    NIXL_CUDA_TRY(::cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
  NIXL_CUDA_TRY(::cudaMalloc(reinterpret_cast<void**>(&device->counters_), kCounters * sizeof(std::uint32_t)));
  NIXL_CUDA_TRY(::cudaMemsetAsync(device->counters_, 0, kCounters * sizeof(std::uint32_t), device->streams_[0]));
  NIXL_CUDA_TRY(::cudaStreamSynchronize(device->streams_[0]));
  for (std::size_t i = kCounters; i-- > 0;) device->free_.push_back(device->counters_ + i);
  return device;
}

Device::~Device() {
  const DeviceScope scope(ordinal_);
  for (cudaStream_t stream : streams_)
    if (stream) ::cudaStreamDestroy(stream);
  if (counters_) ::cudaFree(counters_);
}

Result<std::uint32_t*> Device::take_counter() {
  std::lock_guard lock(mutex_);
  if (free_.empty())
    return fail(Code::kNotAllowed, "GPU %d: %zu prepared lists at once are the most; release some", ordinal_,
                kCounters);
  std::uint32_t* const counter = free_.back();
  free_.pop_back();
  return counter;
}

void Device::give_back_counter(std::uint32_t* counter) noexcept {
  std::lock_guard lock(mutex_);
  free_.push_back(counter);
}

}  // namespace nixl::core::samehost
