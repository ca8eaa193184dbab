// What ranks tell each other while they connect (docs/membership.md): the card in the store, and the messages of a
// link.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>

#include "base/result.h"
#include "net/local.h"

namespace nixl::core::ep {

inline constexpr std::size_t kMaxMessageBytes = 64 * 1024;

std::string store_key(int rank);

// Where a rank can be called.
struct Card {
  int rank = -1;
  std::uint32_t incarnation = 0;
  std::int32_t pid = 0;
  std::string host;
  net::Place place;
  std::string socket;
};
std::string encode(const Card& card);
Result<Card> parse_card(std::string_view bytes);

// First message of a link, from the rank that dialled.
struct Hello {
  int rank = -1;
  std::uint32_t incarnation = 0;
  int called_rank = -1;
  std::uint32_t called_incarnation = 0;
};
// The sender names the receiver too; descriptors travel beside it.
struct Memory {
  int experts_per_rank = 0;
  std::string description;
};
struct Attached {};
struct Ready {};
struct Abort {
  std::string reason;
};

using LinkMessage = std::variant<Hello, Memory, Attached, Ready, Abort>;
std::string encode(const LinkMessage& message);
Result<LinkMessage> parse_message(std::string_view bytes);

}  // namespace nixl::core::ep
