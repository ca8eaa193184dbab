// Parts: what is registered with the engine. It takes no memory twice, not even in part, while callers may register any regions any number
// of times. So regions are made of parts: pieces of memory that do not overlap, registered while some region uses them.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "contract/memory.h"

namespace nixl::core::mooncake {

class Engine;

// The start addresses of the parts that a region lies in, ascending; the first may lie before the region. One copy stays inside one.
class Cuts {
 public:
  Cuts() = default;
  explicit Cuts(std::vector<std::uint64_t> starts) : starts_(std::move(starts)) {}
  const std::vector<std::uint64_t>& starts() const noexcept { return starts_; }
  // How many of `length` bytes at `address` lie in one part.
  std::uint64_t within(std::uint64_t address, std::uint64_t length) const noexcept;

  std::string encode() const;
  // From a peer: checked to be ascending and to begin at or before the region.
  static Result<Cuts> decode(std::string_view bytes, const Region& region);

 private:
  std::vector<std::uint64_t> starts_;
};

// Thread-safe; the engine outlives it.
class Parts {
 public:
  explicit Parts(Engine& engine) : engine_(engine) {}
  Result<Cuts> add(const Region& region);
  void remove(const Cuts& cuts) noexcept;

 private:
  struct Part {
    std::uint64_t end = 0;
    std::uint64_t uses = 0;
  };
  void drop_locked(std::uint64_t start) noexcept;

  Engine& engine_;
  std::mutex mutex_;
  std::map<std::uint64_t, Part> parts_;  // by start
};

}  // namespace nixl::core::mooncake
