// GPU memory across processes: exporting ours, mapping a peer's.
//   virtual-memory allocations (cuMemCreate, expandable segments): a descriptor for each physical piece, fetched from
//   the owner with pidfd_getfd; plain ones (cudaMalloc): an IPC handle. Managed and pool memory can be exported by
//   neither.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "backends/samehost/cuda/driver.h"
#include "backends/samehost/vram.h"
#include "base/fd.h"

namespace nixl::core::samehost {

// One allocation of ours that a region touches; alive as long as a region needs it.
struct Allocation {
  Allocation() = default;
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  ~Allocation();

  const Driver* driver = nullptr;
  std::uint64_t base = 0, bytes = 0;
  std::uint64_t id = 0;  // ours: never used again, so a key tells an allocation from a later one at its address
  unsigned long long buffer_id = 0;  // plain: of the driver
  bool is_virtual = false;
  CUmemGenericAllocationHandle handle = 0;  // virtual: retained
  Fd descriptor;                            // virtual
  cudaIpcMemHandle_t ipc{};                 // plain
};

// What the owner put into a key about one allocation.
struct FarAllocation {
  std::uint64_t base = 0, bytes = 0, id = 0;
  bool is_virtual = false;
  std::uint32_t descriptor = 0;
  cudaIpcMemHandle_t ipc{};
  bool operator<(const FarAllocation& other) const {
    return std::tie(base, bytes, id, descriptor) < std::tie(other.base, other.bytes, other.id, other.descriptor);
  }
};

// A run of neighbouring allocations of a peer, mapped here as one range.
class Span {
 public:
  virtual ~Span() = default;
  // What to add to an address of the peer (modulo 2^64) to reach it from kernels of a device of ours; maps it if
  // needed.
  virtual Result<std::uint64_t> reach(int device) = 0;
  // The device of ours that holds the memory; -1 where the driver does not tell. Mapped through `guess` if it is not yet.
  virtual int owner(int guess) = 0;
  const char* how = "";  // for people: cuda_ipc, cuda_vmm, cuda
};

class CudaMapping final : public VramMapping {
 public:
  explicit CudaMapping(std::shared_ptr<Span> span) : span_(std::move(span)) {}
  Span& span() const noexcept { return *span_; }

 private:
  std::shared_ptr<Span> span_;
};

// Both directions. Set-up calls only: serialised by the agent.
class MemoryExchange {
 public:
  explicit MemoryExchange(const Driver& driver) : driver_(driver) {}
  Result<std::unique_ptr<VramExport>> export_region(const Region& region);
  // `device`: of ours, on which copies will probably run: mapped for it at once; -1: not known yet.
  Result<std::unique_ptr<VramMapping>> map_region(PeerProcess& peer, std::string_view key, int device);
  const Driver& driver() const noexcept { return driver_; }

 private:
  Result<std::shared_ptr<Allocation>> allocation_at(std::uint64_t address);
  Result<std::shared_ptr<Allocation>> virtual_at(std::uint64_t address);
  Result<std::shared_ptr<Allocation>> plain_at(std::uint64_t address);

  const Driver& driver_;
  std::uint64_t next_id_ = 1;
  std::map<std::uint64_t, std::weak_ptr<Allocation>> ours_;  // by base
  std::map<std::pair<std::uint64_t, std::vector<FarAllocation>>, std::weak_ptr<Span>>
      spans_;  // by peer incarnation, content
};

}  // namespace nixl::core::samehost
