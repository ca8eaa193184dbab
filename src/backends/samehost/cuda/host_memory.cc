#include "backends/samehost/cuda/host_memory.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <limits>

#include "backends/samehost/transfer.h"
#include "contract/plan_cursor.h"

namespace nixl::core::samehost {
namespace {

constexpr std::size_t kMostStretches = 64;  // of one region; each is asked for before every submission

std::atomic<std::uint64_t> window_bytes{0};  // of all windows of this process

// Page-locked memory is lost to everybody else: half of the machine's is the most.
std::uint64_t most_window_bytes() {
  static const std::uint64_t most =
      static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)) / 2;
  return most;
}

unsigned long long hex(std::uint64_t address) {
  return static_cast<unsigned long long>(address);
}

}  // namespace

Result<LockedMemory::Stretch> LockedMemory::ask(const Driver& driver, std::uint64_t address) {
  CUmemorytype type{};
  CUdeviceptr device = 0, base = 0;
  std::size_t bytes = 0;
  Stretch stretch;
  CUpointer_attribute what[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_DEVICE_POINTER,
                                CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, CU_POINTER_ATTRIBUTE_RANGE_SIZE,
                                CU_POINTER_ATTRIBUTE_BUFFER_ID};
  void* values[] = {&type, &device, &base, &bytes, &stretch.id};
  const CUresult code = driver.pointer_get_attributes(std::size(what), what, values, address);
  if (code != CUDA_SUCCESS || type != CU_MEMORYTYPE_HOST)
    return fail(Code::kUnsupported, "host memory at %#llx is not page-locked (cudaHostAlloc, cudaHostRegister)",
                hex(address));
  if (device != address)
    return fail(Code::kUnsupported, "GPUs reach the page-locked memory at %#llx at another address (%#llx)",
                hex(address), hex(device));
  if (base > address || bytes <= address - base)
    return fail(Code::kUnsupported, "the driver does not tell how far the page-locked memory at %#llx reaches",
                hex(address));
  stretch.base = base;
  stretch.bytes = bytes;
  return stretch;
}

Result<LockedMemory> LockedMemory::find(const Driver& driver, std::uint64_t address, std::uint64_t bytes) {
  LockedMemory found;
  found.address_ = address, found.bytes_ = bytes;
  const std::uint64_t end = address + std::max<std::uint64_t>(bytes, 1);
  for (std::uint64_t at = address; at < end; at = found.stretches_.back().base + found.stretches_.back().bytes) {
    if (found.stretches_.size() == kMostStretches)
      return fail(Code::kUnsupported,
                  "host memory at %#llx was page-locked in more than %zu pieces; register them apart", hex(address),
                  kMostStretches);
    NIXL_ASSIGN(const Stretch stretch, ask(driver, at));
    // What each device may do with a virtual-memory allocation can change under a request; nobody else's can.
    CUmemGenericAllocationHandle handle = 0;
    if (driver.retain_handle(&handle, reinterpret_cast<void*>(at)) == CUDA_SUCCESS) {
      driver.release(handle);
      return fail(Code::kUnsupported, "host memory at %#llx is a virtual-memory allocation (cuMemCreate)", hex(at));
    }
    unsigned access = 0;
    if (driver.pointer_get_attribute(&access, CU_POINTER_ATTRIBUTE_ACCESS_FLAGS, at) == CUDA_SUCCESS &&
        access == CU_POINTER_ATTRIBUTE_ACCESS_FLAG_READ)
      return fail(Code::kUnsupported, "host memory at %#llx was page-locked for reading only", hex(at));
    found.stretches_.push_back(stretch);
  }
  return found;
}

Result<void> LockedMemory::still_locked(const Driver& driver) const {
  for (const Stretch& known : stretches_) {
    const auto now = ask(driver, known.base);
    if (!now || now->base != known.base || now->bytes != known.bytes || now->id != known.id)
      return fail(Code::kUnsupported,
                  "host memory at %#llx (%llu bytes) was page-locked when this request was made and is not any more",
                  hex(known.base), static_cast<unsigned long long>(known.bytes));
  }
  return {};
}

Result<void> LockedMemory::still_mapped() const {
  return samehost::check_mapped(address_, bytes_);
}

std::uint64_t LockedMemory::bytes_from(std::uint64_t address) const noexcept {
  for (const Stretch& stretch : stretches_)
    if (address >= stretch.base && address - stretch.base < stretch.bytes)
      return stretch.bytes - (address - stretch.base);
  return std::numeric_limits<std::uint64_t>::max();
}

LockedWindows::~LockedWindows() {
  if (std::find(locked_.begin(), locked_.end(), true) == locked_.end()) return;
  const DeviceScope scope(device_);
  for (std::size_t index = 0; index < locked_.size(); ++index)
    if (locked_[index]) {
      ::cudaHostUnregister(base_ + index * kWindow);
      window_bytes.fetch_sub(bytes_of(index), std::memory_order_relaxed);
    }
  (void)::cudaGetLastError();  // the driver may have ended before us
}

std::size_t LockedWindows::bytes_of(std::size_t index) const noexcept {
  return std::min<std::size_t>(kWindow, bytes_ - index * kWindow);
}

Result<void> LockedWindows::lock(std::uint64_t address, std::uint64_t bytes) {
  const std::uint64_t from = address - reinterpret_cast<std::uint64_t>(base_);
  for (std::size_t index = from / kWindow; index * kWindow < from + bytes; ++index)
    if (!locked_[index]) NIXL_TRY(lock_window(index));
  return {};
}

Result<void> LockedWindows::lock_window(std::size_t index) {
  if (refused_) return fail(*refused_);
  const std::size_t bytes = bytes_of(index);
  if (window_bytes.fetch_add(bytes, std::memory_order_relaxed) + bytes > most_window_bytes()) {
    window_bytes.fetch_sub(bytes, std::memory_order_relaxed);
    return fail(Code::kUnsupported, "%llu bytes of peers' memory, half of this machine's, are page-locked here at most",
                static_cast<unsigned long long>(most_window_bytes()));
  }
  char* const start = base_ + index * kWindow;
  const DeviceScope scope(device_);
  cudaError_t code = ::cudaHostRegister(start, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  if (code == cudaSuccess) {
    void* device = nullptr;
    if (::cudaHostGetDevicePointer(&device, start, 0) == cudaSuccess && device == start) {
      locked_[index] = true;
      return {};
    }
    ::cudaHostUnregister(start);
    code = cudaErrorNotSupported;
  }
  (void)::cudaGetLastError();
  window_bytes.fetch_sub(bytes, std::memory_order_relaxed);
  refused_ = Error{Code::kUnsupported,
                   std::string("a peer's memory file cannot be page-locked for GPUs: ") + ::cudaGetErrorString(code)};
  return fail(*refused_);
}

std::uint64_t LockedWindows::bytes_from(std::uint64_t address) const noexcept {
  const std::uint64_t from = address - reinterpret_cast<std::uint64_t>(base_);
  return kWindow - from % kWindow;
}

Result<HostSide> HostSide::open(const Driver& driver, const Plan& plan, int device) {
  HostSide side;
  side.driver_ = &driver;
  side.device_ = device;
  const DeviceScope scope(device);
  if (plan.local_kind == MemKind::kDram) {
    for (const LocalRegion* const region : plan.local_regions) {
      const auto& own = static_cast<const OwnRegion&>(*region);
      NIXL_ASSIGN(auto memory, LockedMemory::find(driver, own.address, own.bytes));
      side.own_.push_back(std::move(memory));
    }
    return side;
  }
  const bool same_process =
      static_cast<PeerConnection*>(plan.peer)->process().pid() == static_cast<std::uint32_t>(::getpid());
  for (RemoteRegion* const region : plan.remote_regions) {
    auto& far = static_cast<FarRegion&>(*region);
    if (same_process) {
      NIXL_ASSIGN(auto memory, LockedMemory::find(driver, far.address, far.bytes));
      side.own_.push_back(std::move(memory));
      continue;
    }
    SharedMapping* const shared = far.shared();
    if (!shared)
      return fail(Code::kUnsupported,
                  "the peer's host memory at %#llx is private to its process: no memory file that "
                  "could be mapped here",
                  hex(far.address));
    if (!shared->lock) shared->lock = std::make_unique<LockedWindows>(device, shared->base(), shared->bytes());
    side.windows_.push_back(static_cast<LockedWindows*>(shared->lock.get()));
  }
  if (!side.windows_.empty()) NIXL_TRY(side.lock_touched(plan));
  return side;
}

Result<void> HostSide::lock_touched(const Plan& plan) {
  std::vector<std::uint64_t> deltas;
  for (RemoteRegion* const region : plan.remote_regions)
    deltas.push_back(static_cast<FarRegion*>(region)->shared()->delta());
  for (PlanCursor cursor(plan); !cursor.at_end();) {
    const Piece piece = cursor.next(std::numeric_limits<std::uint64_t>::max());
    NIXL_TRY(windows_[piece.remote_region]->lock(piece.remote + deltas[piece.remote_region], piece.length));
  }
  return {};
}

Result<void> HostSide::check() const {
  if (own_.empty()) return {};
  const DeviceScope scope(device_);
  for (const LockedMemory& memory : own_) NIXL_TRY(memory.still_locked(*driver_));
  return {};
}

Result<void> HostSide::check_mapped() const {
  for (const LockedMemory& memory : own_) NIXL_TRY(memory.still_mapped());
  return {};
}

std::uint64_t HostSide::bytes_from(std::uint32_t region, std::uint64_t address) const noexcept {
  return windows_.empty() ? own_[region].bytes_from(address) : windows_[region]->bytes_from(address);
}

}  // namespace nixl::core::samehost
