// Host memory that is a shared mapping of a memory file (memfd, shm_open, /dev/shm): peers map it too, and copy without a
// system call. Truncating the file while a peer copies would kill that peer, so that is done with files that are sealed
// against shrinking, or with any where NIXL_SAME_HOST_MAP=y promises that nobody does so; n: never.
#pragma once
#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <optional>

#include "backends/samehost/peer.h"
#include "base/bytes.h"
#include "base/fd.h"
#include "base/result.h"
#include "contract/memory.h"

namespace nixl::core::samehost {

// Which file a region of ours is, and where in it.
class SharedExport {
 public:
  void encode(ByteWriter& out) const;

 private:
  friend class SharedMemory;
  Fd file_;
  std::uint64_t device_ = 0, inode_ = 0, offset_ = 0;
};

// Keeps pages of a mapping where they are.
class PageLock {
 public:
  virtual ~PageLock() = default;
};

// A peer's region, mapped into this process.
class SharedMapping {
 public:
  ~SharedMapping();
  // Added to an address of the peer's, it gives ours.
  std::uint64_t delta() const noexcept { return delta_; }
  // All that is mapped: whole pages.
  char* base() const noexcept { return static_cast<char*>(base_); }
  std::size_t bytes() const noexcept { return bytes_; }
  // Let go before the memory is unmapped; null until GPUs copy to or from it.
  std::unique_ptr<PageLock> lock;

 private:
  friend class SharedMemory;
  void* base_ = nullptr;
  std::size_t bytes_ = 0;
  std::uint64_t delta_ = 0;
};

class SharedMemory {
 public:
  // An error when NIXL_SAME_HOST_MAP is no yes or no.
  static Result<SharedMemory> open();

  // Nothing where the region is not in one such file, or this kernel (below 6.11) has no quick answer to that.
  std::optional<SharedExport> find(const Region& region) const noexcept;
  // Null: it cannot be mapped, and is copied as all other memory. kMismatch: `key` holds no such export.
  Result<std::unique_ptr<SharedMapping>> map(PeerProcess& peer, const Region& region, ByteReader& key) const;

 private:
  enum class Which { kNone, kSealed, kAny };
  bool usable(int file) const noexcept;

  Which which_ = Which::kSealed;
  Fd maps_;  // /proc/self/maps
};

}  // namespace nixl::core::samehost
