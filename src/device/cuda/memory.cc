#include "device/cuda/memory.h"

#include <algorithm>
#include <utility>

namespace nixl::core {
namespace {

CUmemAllocationProp properties_of(int device) {
  CUmemAllocationProp properties = {};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return properties;
}

}  // namespace

void DeviceSpan::swap(DeviceSpan& other) noexcept {
  std::swap(device_, other.device_);
  std::swap(base_, other.base_);
  std::swap(reserved_, other.reserved_);
  std::swap(size_, other.size_);
  std::swap(granularity_, other.granularity_);
  std::swap(chunks_, other.chunks_);
}

DeviceSpan::~DeviceSpan() {
  auto driver = cuda_driver();
  if (!driver || !base_) return;
  const DeviceScope scope(device_);
  std::int64_t at = 0;
  for (const Chunk& chunk : chunks_) {
    (void)(*driver)->unmap(base_ + at, chunk.bytes);
    (void)(*driver)->release(chunk.handle);
    at += chunk.bytes;
  }
  (void)(*driver)->free_addresses(base_, reserved_);
}

Result<DeviceSpan> DeviceSpan::reserve(int device, std::int64_t most_bytes) {
  NIXL_ASSIGN(const CudaDriver* driver, cuda_driver());
  const DeviceScope scope(device);
  DeviceSpan span;
  span.device_ = device;
  const CUmemAllocationProp properties = properties_of(device);
  std::size_t granularity = 0;
  NIXL_TRY(cuda_check(driver->get_granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                      "granularity of device memory"));
  span.granularity_ = static_cast<std::int64_t>(granularity);
  span.reserved_ = (most_bytes + span.granularity_ - 1) / span.granularity_ * span.granularity_;
  NIXL_TRY(cuda_check(driver->reserve_addresses(&span.base_, span.reserved_, 0, 0, 0),
                      "reserve addresses for device memory"));
  return span;
}

Result<void> DeviceSpan::map_handle(CUmemGenericAllocationHandle handle, std::int64_t bytes) {
  NIXL_ASSIGN(const CudaDriver* driver, cuda_driver());
  auto mapped = cuda_check(driver->map(base_ + size_, bytes, 0, handle, 0), "map device memory");
  if (!mapped) {
    (void)driver->release(handle);
    return mapped;
  }
  CUmemAccessDesc access = {};
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = device_;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  auto allowed = cuda_check(driver->set_access(base_ + size_, bytes, &access, 1),
                            "access to device memory (of another GPU: is there NVLink or peer access?)");
  if (!allowed) {
    (void)driver->unmap(base_ + size_, bytes);
    (void)driver->release(handle);
    return allowed;
  }
  chunks_.push_back({handle, bytes});
  size_ += bytes;
  return {};
}

Result<void> DeviceSpan::grow(std::int64_t bytes) {
  if (bytes <= size_) return {};
  NIXL_ASSIGN(const CudaDriver* driver, cuda_driver());
  const DeviceScope scope(device_);
  const std::int64_t more = (bytes - size_ + granularity_ - 1) / granularity_ * granularity_;
  if (size_ + more > reserved_)
    return fail(Code::kInvalidArgument, "device memory of %lld bytes is beyond the %lld reserved",
                static_cast<long long>(bytes), static_cast<long long>(reserved_));
  const CUmemAllocationProp properties = properties_of(device_);
  CUmemGenericAllocationHandle handle;
  NIXL_TRY(cuda_check(driver->create(&handle, more, &properties, 0), "allocate device memory that can be shared"));
  const std::int64_t before = size_;
  NIXL_TRY(map_handle(handle, more));
  return cuda_check(cudaMemset(data() + before, 0, more), "zero device memory");
}

Result<void> DeviceSpan::map(Fd descriptor, std::int64_t bytes) {
  NIXL_ASSIGN(const CudaDriver* driver, cuda_driver());
  const DeviceScope scope(device_);
  if (bytes <= 0 || size_ + bytes > reserved_)
    return fail(Code::kMismatch, "a chunk of %lld bytes does not fit the %lld announced", static_cast<long long>(bytes),
                static_cast<long long>(reserved_));
  CUmemGenericAllocationHandle handle;
  NIXL_TRY(
      cuda_check(driver->import_handle(&handle, reinterpret_cast<void*>(static_cast<std::intptr_t>(descriptor.get())),
                                       CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                 "import device memory of another process"));
  return map_handle(handle, bytes);
}

Result<std::vector<Fd>> DeviceSpan::export_chunks() const {
  NIXL_ASSIGN(const CudaDriver* driver, cuda_driver());
  const DeviceScope scope(device_);
  std::vector<Fd> descriptors;
  for (const Chunk& chunk : chunks_) {
    int descriptor = -1;
    NIXL_TRY(cuda_check(driver->export_handle(&descriptor, chunk.handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                        "export device memory"));
    descriptors.emplace_back(descriptor);
  }
  return descriptors;
}

std::vector<std::int64_t> DeviceSpan::chunk_bytes() const {
  std::vector<std::int64_t> bytes;
  for (const Chunk& chunk : chunks_) bytes.push_back(chunk.bytes);
  return bytes;
}

}  // namespace nixl::core
