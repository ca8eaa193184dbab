// Frames of the socket exchange (docs/wire.md): u64 length, then a payload that begins with a verb.
#pragma once
#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"

namespace nixl::core {

enum class Verb { kLoad, kSend, kInvalidate, kHello, kSealed };

struct Frame {
  Verb verb = Verb::kSend;
  std::string body;  // kLoad: metadata; kInvalidate: agent name; kHello: nonce; kSealed: see seal.h
};

inline constexpr std::size_t kMaxFrameBytes = 1u << 30;

std::string encode_frame(Verb verb, std::string_view body);
// What follows a frame's length: verb and body.
Result<Frame> decode_payload(std::string_view payload);

// Collects what arrives on one connection and cuts it into frames.
class FrameReader {
 public:
  void append(const char* bytes, std::size_t size) { input_.append(bytes, size); }
  // nullopt: incomplete. An error ends the conversation: nothing more can be read from it.
  Result<std::optional<Frame>> next();
  bool empty() const noexcept { return input_.empty(); }

 private:
  std::string input_;
};

}  // namespace nixl::core
