// Kinds of memory, registered regions and parameters: the words that the agent and its backends share.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <map>
#include <string>

namespace nixl::core {

enum class MemKind : std::uint8_t { kDram = 0, kVram = 1, kBlock = 2, kObject = 3, kFile = 4 };
inline constexpr int kNumMemKinds = 5;

// "DRAM_SEG", "VRAM_SEG", "BLK_SEG", "OBJ_SEG", "FILE_SEG": the names users see.
constexpr const char* name(MemKind kind) noexcept {
  constexpr const char* kNames[kNumMemKinds] = {"DRAM_SEG", "VRAM_SEG", "BLK_SEG", "OBJ_SEG", "FILE_SEG"};
  return kNames[static_cast<int>(kind)];
}
constexpr bool is_storage(MemKind kind) noexcept {
  return kind >= MemKind::kBlock;
}

class KindSet {
 public:
  constexpr KindSet() = default;
  constexpr KindSet(std::initializer_list<MemKind> kinds) {
    for (const MemKind kind : kinds) add(kind);
  }
  constexpr void add(MemKind kind) noexcept { bits_ |= static_cast<std::uint8_t>(1u << static_cast<int>(kind)); }
  constexpr bool has(MemKind kind) const noexcept { return bits_ >> static_cast<int>(kind) & 1; }
  constexpr bool empty() const noexcept { return bits_ == 0; }
  constexpr KindSet operator|(KindSet other) const noexcept {
    other.bits_ |= bits_;
    return other;
  }
  constexpr bool operator==(const KindSet&) const = default;

 private:
  std::uint8_t bits_ = 0;
};

// One piece of memory, file, volume or object as its owner registers it.
//   address  DRAM, VRAM: virtual address; FILE, BLOCK, OBJ: byte offset
//   length   bytes; 0 in FILE, BLOCK and OBJ means unbounded
//   device   VRAM: GPU ordinal; FILE: descriptor or id; BLOCK: volume id; OBJ: caller's id; DRAM: free
//   meta     FILE: path text, OBJ: key; may be empty and may hold any bytes
struct Region {
  MemKind kind = MemKind::kDram;
  std::uint64_t address = 0;
  std::uint64_t length = 0;
  std::uint64_t device = 0;
  std::string meta;
};

// Initialisation parameters. An empty value means "not set".
using Params = std::map<std::string, std::string, std::less<>>;

}  // namespace nixl::core
