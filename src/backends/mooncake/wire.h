// What Mooncake backends say to each other beside the data, which the engine moves: docs/mooncake.md.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"
#include "contract/backend.h"

namespace nixl::core::mooncake {

inline constexpr std::size_t kMaxMessage = 64 << 20;
inline constexpr std::size_t kMaxFrame = kMaxMessage + 64;

// How others reach an agent: the bytes of export_connection().
struct Contact {
  std::uint64_t incarnation = 0;
  std::string address;  // numeric, of the post office
  std::uint16_t port = 0;
  std::string segment;   // the engine's name
  std::string protocol;  // "tcp" or "rdma"

  std::string encode() const;
  static Result<Contact> decode(std::string_view bytes);
};

enum class FrameKind : std::uint8_t { kHello = 1, kWelcome = 2, kMessage = 3, kBye = 4 };

// The first frame of a caller. The answer is a welcome, or the connection is closed.
struct Hello {
  PeerId caller;
  std::uint64_t wanted_incarnation = 0;

  std::string encode() const;
  static Result<Hello> decode(std::string_view frame);
};

std::string frame_of(FrameKind kind, std::string_view body = {});
Result<FrameKind> kind_of(std::string_view frame);
inline std::string_view body_of(std::string_view frame) {
  return frame.substr(1);
}

bool is_numeric_address(const std::string& text);

}  // namespace nixl::core::mooncake
