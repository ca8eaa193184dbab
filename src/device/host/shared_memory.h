// Memory that processes of one host share: anonymous (memfd), passed on by descriptor, so that no name is left behind
// by any death. Pages that nobody touched cost nothing, so sizes may be generous.
//
// Within one process every handle of the same memory uses the same mapping: ranks that run as threads see one address,
// and a thread sanitizer sees what they share. Handles are cheap to copy; the mapping ends with the last one.
// Thread-safe.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/fd.h"
#include "base/result.h"

namespace nixl::core {

class SharedMemory {
 public:
  SharedMemory() = default;

  // Zeroed memory of `bytes` (rounded up to pages). `label` appears in /proc/PID/maps. It can grow, never shrink.
  static Result<SharedMemory> create(const char* label, std::int64_t bytes);
  // Maps the whole of what a descriptor of `create` names, readable and writable. Anything else is kMismatch: memory
  // that could shrink would turn a later read into SIGBUS.
  static Result<SharedMemory> import(Fd descriptor);

  // Makes the memory at least `bytes` long. Other handles keep the length they were mapped with; old addresses stay
  // valid as long as their handles. The owner's own handle may move.
  Result<void> grow(std::int64_t bytes);
  // Maps again if the owner has grown the memory since.
  Result<void> refresh();
  // A descriptor for import, in this process or another one.
  Result<Fd> export_descriptor() const;

  std::byte* data() const noexcept;
  std::int64_t size() const noexcept;  // bytes mapped here
  explicit operator bool() const noexcept { return mapping_ != nullptr; }

 private:
  struct Mapping;
  static Result<std::shared_ptr<Mapping>> map(int descriptor);
  std::shared_ptr<Fd> descriptor_;
  std::shared_ptr<Mapping> mapping_;
};

}  // namespace nixl::core
