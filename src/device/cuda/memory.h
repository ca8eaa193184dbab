// Device memory that other processes can map: made by the virtual-memory functions, passed on as file descriptors.
//
// A span is a range of addresses that grows by chunks; addresses never move. The exporter may die: a mapping keeps what it
// maps alive until it is closed. Not thread-safe; a span is used by one thread at a time.
#pragma once
#include <cstdint>
#include <vector>

#include "base/fd.h"
#include "device/cuda/driver.h"

namespace nixl::core {

class DeviceSpan {
 public:
  DeviceSpan() = default;
  DeviceSpan(DeviceSpan&& other) noexcept { swap(other); }
  DeviceSpan& operator=(DeviceSpan&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceSpan();

  // Addresses for up to `most_bytes` on `device`; no memory yet.
  static Result<DeviceSpan> reserve(int device, std::int64_t most_bytes);
  // Adds zeroed memory until at least `bytes` are there.
  Result<void> grow(std::int64_t bytes);
  // Maps, behind what is there, a chunk that another process exported.
  Result<void> map(Fd descriptor, std::int64_t bytes);
  // One descriptor for each chunk, in order.
  Result<std::vector<Fd>> export_chunks() const;

  std::uint8_t* data() const noexcept { return reinterpret_cast<std::uint8_t*>(base_); }
  std::int64_t size() const noexcept { return size_; }
  std::vector<std::int64_t> chunk_bytes() const;

 private:
  struct Chunk {
    CUmemGenericAllocationHandle handle;
    std::int64_t bytes;
  };
  void swap(DeviceSpan& other) noexcept;
  Result<void> map_handle(CUmemGenericAllocationHandle handle, std::int64_t bytes);

  int device_ = 0;
  CUdeviceptr base_ = 0;
  std::int64_t reserved_ = 0;
  std::int64_t size_ = 0;
  std::int64_t granularity_ = 0;
  std::vector<Chunk> chunks_;
};

}  // namespace nixl::core
