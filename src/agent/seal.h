// A secret shared by listeners and their callers (docs/wire.md): both prove that they know it, no frame can be forged, changed or
// played again. Nothing is encrypted.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "agent/frames.h"

namespace nixl::core {

// One end of one connection; frames of each direction are counted.
class Seal {
 public:
  enum class Side : char { kCaller = 'c', kListener = 'l' };
  static constexpr std::size_t kNonceBytes = 16;
  static std::string nonce();  // random

  Seal(std::string secret, Side side, const std::string& caller_nonce, const std::string& listener_nonce)
      : secret_(std::move(secret)), nonces_(caller_nonce + listener_nonce), side_(side) {}
  // The frame (as encode_frame gives it) inside a sealed one.
  std::string close(std::string_view frame);
  // kMismatch when the other side does not know the secret, or the frame is not the next one of this connection.
  Result<Frame> open(const Frame& sealed);

 private:
  std::string mac(Side from, std::uint64_t count, std::string_view payload) const;
  const std::string secret_, nonces_;
  const Side side_;
  std::uint64_t num_sent_ = 0, num_received_ = 0;
};

}  // namespace nixl::core
