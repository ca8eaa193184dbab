// Host memory that kernels and copy engines reach without staging: what the caller has page-locked, and memory files of
// peers, whose mappings here are page-locked when a transfer first touches them.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "backends/samehost/connection.h"
#include "backends/samehost/cuda/driver.h"
#include "contract/plan.h"

namespace nixl::core::samehost {

// Memory of this process that its owner has page-locked (cudaHostAlloc, cudaHostRegister, torch's pin_memory), as the
// driver knew it when it was asked. A context must be current in every call.
class LockedMemory {
 public:
  // kUnsupported: some of it is not page-locked, or GPUs reach it at another address or for reading only.
  static Result<LockedMemory> find(const Driver& driver, std::uint64_t address, std::uint64_t bytes);
  // kUnsupported: it was freed or unlocked since. One question a piece that was locked by itself.
  Result<void> still_locked(const Driver& driver) const;
  // kIo: it was unmapped since, which the driver does not notice.
  Result<void> still_mapped() const;
  // How many bytes from `address` on were locked by one call; the copy engine takes no more at once.
  std::uint64_t bytes_from(std::uint64_t address) const noexcept;

 private:
  struct Stretch {
    std::uint64_t base = 0, bytes = 0;
    unsigned long long id = 0;  // of the driver: another one after it was freed and made anew
  };
  static Result<Stretch> ask(const Driver& driver, std::uint64_t address);
  std::uint64_t address_ = 0, bytes_ = 0;
  std::vector<Stretch> stretches_;  // neighbours, in order; at least the above
};

// A mapped memory file, page-locked in windows as transfers need them, and until it is unmapped. Page-locked pages stay
// what they are, whatever becomes of the file: nothing its owner does can take them from under a copy. Set-up calls only.
class LockedWindows final : public PageLock {
 public:
  static constexpr std::uint64_t kWindow = 64 << 20;
  // `device`: of ours, whose context the driver is asked in.
  LockedWindows(int device, char* base, std::size_t bytes)
      : device_(device), base_(base), bytes_(bytes), locked_((bytes + kWindow - 1) / kWindow) {}
  ~LockedWindows() override;
  // kUnsupported: the driver refuses, or this process has locked as much as it may.
  Result<void> lock(std::uint64_t address, std::uint64_t bytes);
  std::uint64_t bytes_from(std::uint64_t address) const noexcept;

 private:
  Result<void> lock_window(std::size_t index);
  std::size_t bytes_of(std::size_t index) const noexcept;

  const int device_;
  char* const base_;
  const std::size_t bytes_;
  std::vector<bool> locked_;
  std::optional<Error> refused_;  // asked once
};

// The host side of a plan whose other side is GPU memory.
class HostSide {
 public:
  // kUnsupported: not all of it is within reach of GPUs; the reason says why. `device`: of ours, which copies.
  static Result<HostSide> open(const Driver& driver, const Plan& plan, int device);
  // Others may unlock it while requests are prepared: check() before each submission. What is locked here stays so.
  bool can_change() const noexcept { return !own_.empty(); }
  // kUnsupported: not within reach any more; a kernel would run into nothing.
  Result<void> check() const;
  // Before each submission and after it: kIo where memory was freed in spite of being registered.
  Result<void> check_mapped() const;
  // Bytes from `address` on, as this process reaches it, that the copy engine takes at once; `region` of the host's side.
  std::uint64_t bytes_from(std::uint32_t region, std::uint64_t address) const noexcept;
  // For people, before the name of the GPU memory's path.
  const char* how() const noexcept { return windows_.empty() ? "pinned" : "pinned+shm"; }

 private:
  Result<void> lock_touched(const Plan& plan);

  const Driver* driver_ = nullptr;
  int device_ = 0;
  std::vector<LockedMemory> own_;        // by region of the host's side, unless that is mapped:
  std::vector<LockedWindows*> windows_;  // by remote region
};

}  // namespace nixl::core::samehost
