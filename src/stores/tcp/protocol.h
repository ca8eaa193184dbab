// The wire of torch's c10d TCPStore, the part a store of metadata needs, so that either end may be torch's. Integers
// are little endian; a text is u64 length and bytes. A connection begins with VALIDATE.
//
//   VALIDATE    u32 kMagic                  no answer
//   SET         text key, text value        no answer
//   GET         text key                    text value (of a key that exists)
//   CHECK       u64 count, text keys        u8: 0 all exist, 1 not all
//   DELETE_KEY  text key                    i64 number of keys deleted
//   PING        u32 number                  u32 the same number
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace nixl::core::tcp_store {

inline constexpr std::uint32_t kMagic = 0x3C85F7CE;
inline constexpr std::size_t kMaxKeyBytes = 4096;
inline constexpr std::size_t kMaxValueBytes = std::size_t{64} << 20;
inline constexpr std::size_t kMaxKeys = 4096;  // of one CHECK

enum class Verb : std::uint8_t { kValidate = 0, kSet = 1, kGet = 3, kCheck = 5, kDeleteKey = 8, kPing = 13 };

struct Request {
  Verb verb = Verb::kPing;
  std::vector<std::string> keys;
  std::string value;
  std::uint32_t number = 0;  // VALIDATE, PING
};
std::string encode(const Request& request);

// The first request in `input` and how many bytes it took; nullopt while it is incomplete. Sizes beyond the limits and
// unknown verbs are kMismatch.
struct Parsed {
  Request request;
  std::size_t used = 0;
};
Result<std::optional<Parsed>> parse_request(std::string_view input);

std::string encode_text(std::string_view text);

}  // namespace nixl::core::tcp_store
