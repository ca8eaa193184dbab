#include "backends/samehost/cuda/memory.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/bytes.h"

namespace nixl::core::samehost {
namespace {

constexpr std::uint8_t kKeyVersion = 1;
constexpr std::uint32_t kMaxAllocations = 1 << 16;

class CudaExport final : public VramExport {
 public:
  CudaExport(int device, std::vector<std::shared_ptr<Allocation>> allocations)
      : device_(device), allocations_(std::move(allocations)) {}
  int device() const noexcept override { return device_; }
  std::string key() const override {
    ByteWriter out;
    out.put(kKeyVersion);
    out.put(static_cast<std::uint32_t>(device_));
    out.put(static_cast<std::uint32_t>(allocations_.size()));
    for (const auto& allocation : allocations_) {
      out.put(allocation->base);
      out.put(allocation->bytes);
      out.put(allocation->id);
      out.put(static_cast<std::uint8_t>(allocation->is_virtual));
      if (allocation->is_virtual)
        out.put(static_cast<std::uint32_t>(allocation->descriptor.get()));
      else
        out.put_raw({allocation->ipc.reserved, sizeof allocation->ipc.reserved});
    }
    return out.take();
  }

 private:
  int device_;
  std::vector<std::shared_ptr<Allocation>> allocations_;
};

// The device that holds the GPU memory at an address of ours.
int device_of_memory(const Driver& driver, std::uint64_t address) {
  int device = -1;
  return driver.pointer_get_attribute(&device, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address) == CUDA_SUCCESS ? device
                                                                                                             : -1;
}

struct Key {
  int device = 0;  // ordinal in the owner's process
  std::vector<FarAllocation> allocations;
};

Result<Key> parse(std::string_view bytes) {
  ByteReader in(bytes);
  Key key;
  NIXL_ASSIGN(const std::uint8_t version, in.get<std::uint8_t>());
  NIXL_ASSIGN(const std::uint32_t device, in.get<std::uint32_t>());
  NIXL_ASSIGN(const std::uint32_t count, in.get<std::uint32_t>());
  if (version != kKeyVersion || count == 0 || count > kMaxAllocations)
    return fail(Code::kMismatch, "GPU key of version %u with %u allocations (version %u, 1 to %u wanted)", version,
                count, kKeyVersion, kMaxAllocations);
  key.device = static_cast<int>(device);
  for (std::uint32_t i = 0; i < count; ++i) {
    FarAllocation far;
    NIXL_ASSIGN(far.base, in.get<std::uint64_t>());
    NIXL_ASSIGN(far.bytes, in.get<std::uint64_t>());
    NIXL_ASSIGN(far.id, in.get<std::uint64_t>());
    NIXL_ASSIGN(const std::uint8_t is_virtual, in.get<std::uint8_t>());
    far.is_virtual = is_virtual != 0;
    if (far.is_virtual) {
      NIXL_ASSIGN(far.descriptor, in.get<std::uint32_t>());
    } else {
      NIXL_ASSIGN(const std::string_view handle, in.get_raw(sizeof far.ipc.reserved));
      std::memcpy(far.ipc.reserved, handle.data(), handle.size());
    }
    const bool follows = i == 0 || far.base == key.allocations.back().base + key.allocations.back().bytes;
    if (!follows || far.bytes == 0 || (!far.is_virtual && count > 1))
      return fail(Code::kMismatch, "GPU key: allocation %u of %u does not follow its neighbour", i, count);
    key.allocations.push_back(far);
  }
  return key;
}

// Memory of this very process: nothing to map, but another device's may need peer access.
class OwnSpan final : public Span {
 public:
  explicit OwnSpan(int owner) : owner_(owner) { how = "cuda"; }
  int owner(int) override { return owner_; }
  Result<std::uint64_t> reach(int device) override {
    if (device == owner_) return 0;
    const DeviceScope scope(device);
    const cudaError_t code = ::cudaDeviceEnablePeerAccess(owner_, 0);
    if (code == cudaSuccess || code == cudaErrorPeerAccessAlreadyEnabled) return 0;
    return fail(Code::kUnsupported, "GPU %d cannot reach GPU %d: %s", device, owner_, ::cudaGetErrorString(code));
  }

 private:
  int owner_;
};

// A plain allocation: opened once for each device that copies.
class IpcSpan final : public Span {
 public:
  IpcSpan(const Driver& driver, const FarAllocation& far) : driver_(driver), far_(far) { how = "cuda_ipc"; }
  ~IpcSpan() override {
    for (const auto& [device, base] : open_) {
      const DeviceScope scope(device);
      ::cudaIpcCloseMemHandle(base);
    }
  }
  Result<std::uint64_t> reach(int device) override {
    auto found = open_.find(device);
    if (found == open_.end()) {
      const DeviceScope scope(device);
      void* base = nullptr;
      const cudaError_t code = ::cudaIpcOpenMemHandle(&base, far_.ipc, cudaIpcMemLazyEnablePeerAccess);
      if (code != cudaSuccess)
        return fail(Code::kUnsupported, "the peer's GPU memory cannot be mapped for GPU %d: CUDA error %d (%s)", device,
                    static_cast<int>(code), ::cudaGetErrorString(code));
      found = open_.emplace(device, base).first;
    }
    return reinterpret_cast<std::uint64_t>(found->second) - far_.base;
  }
  int owner(int guess) override {
    if (open_.empty() && !reach(guess)) return -1;
    if (owner_ < 0) {
      const auto& [device, base] = *open_.begin();
      const DeviceScope scope(device);
      owner_ = device_of_memory(driver_, reinterpret_cast<std::uint64_t>(base));
    }
    return owner_;
  }

 private:
  const Driver& driver_;
  const FarAllocation far_;
  std::map<int, void*> open_;
  int owner_ = -1;
};

// Virtual-memory pieces: one reserved range, made accessible to each device that copies.
class VirtualSpan final : public Span {
 public:
  static Result<std::shared_ptr<Span>> open(const Driver& driver, PeerProcess& peer,
                                            const std::vector<FarAllocation>& all) {
    auto span = std::make_shared<VirtualSpan>(driver, all.front().base);
    for (const FarAllocation& far : all) span->bytes_ += far.bytes;
    NIXL_CUDA_TRY(driver.reserve(&span->base_, span->bytes_, 0, 0, 0));
    for (const FarAllocation& far : all) NIXL_TRY(span->add(peer, far));
    return span;
  }
  VirtualSpan(const Driver& driver, std::uint64_t far_base) : driver_(driver), far_base_(far_base) { how = "cuda_vmm"; }
  ~VirtualSpan() override {
    if (mapped_) driver_.unmap(base_, mapped_);
    if (base_) driver_.free_address(base_, bytes_);
  }
  Result<std::uint64_t> reach(int device) override {
    if (!(granted_ >> device & 1)) {
      CUmemAccessDesc access{};
      access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
      access.location.id = device;
      access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
      const DeviceScope scope(device);
      if (const CUresult code = driver_.set_access(base_, bytes_, &access, 1); code != CUDA_SUCCESS) {
        const Error why = cuda_error("cuMemSetAccess of the peer's memory", code).value();
        return fail(Code::kUnsupported, "GPU %d: %s", device, why.reason.c_str());
      }
      granted_ |= std::uint64_t{1} << device;
    }
    return base_ - far_base_;
  }
  int owner(int guess) override {
    if (owner_ < 0) {
      const DeviceScope scope(guess);
      owner_ = device_of_memory(driver_, base_);
    }
    return owner_;
  }

 private:
  Result<void> add(PeerProcess& peer, const FarAllocation& far) {
    const Fd descriptor(static_cast<int>(::syscall(SYS_pidfd_getfd, peer.pid_fd(), far.descriptor, 0)));
    if (!descriptor) {
      const int error = errno;
      if (!peer.alive(true)) return fail(Code::kPeerLost, "process %u died", peer.pid());
      return fail(
          errno_error("pidfd_getfd of the peer's GPU memory (needs the right to trace it)", error, Code::kUnsupported));
    }
    CUmemGenericAllocationHandle handle = 0;
    NIXL_CUDA_TRY(driver_.import_handle(&handle, reinterpret_cast<void*>(static_cast<std::intptr_t>(descriptor.get())),
                                        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    const CUresult mapped = driver_.map(base_ + mapped_, far.bytes, 0, handle, 0);
    driver_.release(handle);  // the mapping keeps the memory
    NIXL_CUDA_TRY(mapped);
    mapped_ += far.bytes;
    return {};
  }

  const Driver& driver_;
  const std::uint64_t far_base_;
  CUdeviceptr base_ = 0;
  std::uint64_t bytes_ = 0, mapped_ = 0, granted_ = 0;
  int owner_ = -1;
};

}  // namespace

Allocation::~Allocation() {
  if (handle) driver->release(handle);
}

// The virtual-memory piece mapped at an address; null handle in the result: this is no such memory.
Result<std::shared_ptr<Allocation>> MemoryExchange::virtual_at(std::uint64_t address) {
  auto fresh = std::make_shared<Allocation>();
  fresh->driver = &driver_;
  if (driver_.retain_handle(&fresh->handle, reinterpret_cast<void*>(address)) != CUDA_SUCCESS) {
    fresh->handle = 0;
    return fresh;
  }
  fresh->is_virtual = true;
  CUdeviceptr base = 0;
  std::size_t bytes = 0;
  NIXL_CUDA_TRY(driver_.pointer_get_attribute(&base, CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR, address));
  NIXL_CUDA_TRY(driver_.pointer_get_attribute(&bytes, CU_POINTER_ATTRIBUTE_MAPPING_SIZE, address));
  // While a piece is retained its handle is not given to another one.
  if (auto known = ours_[base].lock(); known && known->handle == fresh->handle && known->bytes == bytes) return known;
  fresh->base = base;
  fresh->bytes = bytes;
  int descriptor = -1;
  const CUresult code = driver_.export_handle(&descriptor, fresh->handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  if (code != CUDA_SUCCESS)
    return fail(Code::kUnsupported,
                "this virtual-memory allocation was created without a descriptor handle type and cannot "
                "be exported (cuMemExportToShareableHandle: %d)",
                static_cast<int>(code));
  fresh->descriptor = Fd(descriptor);
  return fresh;
}

Result<std::shared_ptr<Allocation>> MemoryExchange::plain_at(std::uint64_t address) {
  auto fresh = std::make_shared<Allocation>();
  fresh->driver = &driver_;
  CUdeviceptr base = 0;
  std::size_t bytes = 0;
  if (const CUresult code = driver_.get_address_range(&base, &bytes, address); code != CUDA_SUCCESS)
    return fail(Code::kInvalidArgument, "%#llx is no GPU memory of this process (cuMemGetAddressRange: %d)",
                static_cast<unsigned long long>(address), static_cast<int>(code));
  unsigned managed = 0;
  NIXL_CUDA_TRY(driver_.pointer_get_attribute(&fresh->buffer_id, CU_POINTER_ATTRIBUTE_BUFFER_ID, address));
  NIXL_CUDA_TRY(driver_.pointer_get_attribute(&managed, CU_POINTER_ATTRIBUTE_IS_MANAGED, address));
  if (managed)
    return fail(Code::kUnsupported, "managed memory (cudaMallocManaged) cannot be exported to other processes");
  if (auto known = ours_[base].lock(); known && known->buffer_id == fresh->buffer_id && known->bytes == bytes)
    return known;
  fresh->base = base;
  fresh->bytes = bytes;
  if (const cudaError_t code = ::cudaIpcGetMemHandle(&fresh->ipc, reinterpret_cast<void*>(base)); code != cudaSuccess)
    return fail(Code::kUnsupported, "this GPU memory has no IPC handle (%s); memory pools cannot be exported",
                ::cudaGetErrorString(code));
  return fresh;
}

Result<std::shared_ptr<Allocation>> MemoryExchange::allocation_at(std::uint64_t address) {
  NIXL_ASSIGN(auto allocation, virtual_at(address));
  if (!allocation->is_virtual) {
    NIXL_ASSIGN(allocation, plain_at(address));
  }
  if (allocation->id == 0) {
    allocation->id = next_id_++;
    ours_[allocation->base] = allocation;
  }
  return allocation;
}

Result<std::unique_ptr<VramExport>> MemoryExchange::export_region(const Region& region) {
  const int device = static_cast<int>(region.device);
  int count = 0;
  NIXL_CUDA_TRY(::cudaGetDeviceCount(&count));
  if (device < 0 || device >= count)
    return fail(Code::kInvalidArgument, "VRAM on GPU %d; this process sees GPUs 0 to %d", device, count - 1);
  const DeviceScope scope(device);
  std::vector<std::shared_ptr<Allocation>> allocations;
  std::uint64_t at = region.address;
  const std::uint64_t end = region.address + std::max<std::uint64_t>(region.length, 1);
  while (at < end) {
    NIXL_ASSIGN(auto allocation, allocation_at(at));
    at = allocation->base + allocation->bytes;
    if (!allocations.empty() && (!allocation->is_virtual || !allocations.back()->is_virtual))
      return fail(Code::kUnsupported, "a region that spans several plain GPU allocations; register them apart");
    allocations.push_back(std::move(allocation));
  }
  return std::make_unique<CudaExport>(device, std::move(allocations));
}

Result<std::unique_ptr<VramMapping>> MemoryExchange::map_region(PeerProcess& peer, std::string_view bytes, int device) {
  NIXL_ASSIGN(Key key, parse(bytes));
  const bool is_own = peer.pid() == static_cast<std::uint32_t>(::getpid());
  const std::pair name{peer.segment().header().incarnation, key.allocations};
  std::shared_ptr<Span> span = spans_[name].lock();
  if (!span) {
    // Driver calls need some context; without a device of ours yet, the current one's does.
    int current = device;
    if (current < 0) NIXL_CUDA_TRY(::cudaGetDevice(&current));
    const DeviceScope scope(current);
    if (is_own) {
      span = std::make_shared<OwnSpan>(key.device);
    } else if (key.allocations[0].is_virtual) {
      NIXL_ASSIGN(span, VirtualSpan::open(driver_, peer, key.allocations));
    } else {
      span = std::make_shared<IpcSpan>(driver_, key.allocations[0]);
    }
    if (device >= 0) NIXL_TRY(span->reach(device));
    std::erase_if(spans_, [](const auto& entry) { return entry.second.expired(); });
    spans_[name] = span;
  }
  return std::make_unique<CudaMapping>(std::move(span));
}

}  // namespace nixl::core::samehost
