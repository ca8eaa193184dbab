// Requests and answers of the TCP store, each one frame of net/channel.h.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/result.h"

namespace nixl::core::tcp_store {

inline constexpr std::size_t kMaxKeyBytes = 4096;
inline constexpr std::size_t kMaxValueBytes = std::size_t{64} << 20;
inline constexpr std::size_t kMaxFrameBytes = kMaxKeyBytes + kMaxValueBytes + 64;

enum class Verb : std::uint8_t { kPublish = 1, kFetch = 2, kWithdraw = 3 };

struct Request {
  Verb verb = Verb::kFetch;
  std::string key;
  std::string value;        // kPublish
  Nanoseconds wait_ns = 0;  // kFetch: how long the server may wait for the key
};
std::string encode(const Request& request);
Result<Request> parse_request(std::string_view bytes);

struct Answer {
  bool found = false;  // true for publish and withdraw
  std::string value;   // of a fetch
};
std::string encode(const Answer& answer);
Result<Answer> parse_answer(std::string_view bytes);

}  // namespace nixl::core::tcp_store
