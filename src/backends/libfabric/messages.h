// Messages between two backends; docs/libfabric.md gives the layout. Bytes arrive from outside: decoding checks
// them.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"

namespace nixl::core::libfabric {

enum class MessageKind : std::uint8_t { kHello = 1, kHelloAck, kNotify, kRevoke, kPing, kPong, kBye, kClose, kGap };

inline constexpr std::uint32_t kMessageVersion = 0x4e584c01;  // "NXL", version 1
inline constexpr std::size_t kFrameBytes = 16 << 10;          // of one message on the wire, at most
inline constexpr std::size_t kMaxAddressBytes = 512, kMaxNameBytes = 4 << 10;
inline constexpr std::uint32_t kMaxRailsOfPeer = 64;
inline constexpr std::size_t kMaxNotificationBytes = std::size_t{1} << 30;

// How others reach a backend: what export_connection() gives out.
struct RailAddress {
  std::string fabric, address;
};
struct ConnectionBytes {
  std::string provider;
  std::uint32_t address_format = 0;
  bool driven = false;  // a thread answers whatever the program does
  std::vector<RailAddress> rails;
};

// A region's key on every rail of its owner; `base` is what addresses are counted from.
struct RegionKey {
  struct OnRail {
    std::uint64_t key = 0, base = 0;
  };
  std::uint64_t id = 0;
  std::vector<OnRail> rails;
};

// First message over a path of a link: who calls, whom it expects, and where to answer.
struct Hello {
  std::uint64_t expected_incarnation = 0, incarnation = 0, link = 0;
  std::uint32_t path = 0, attempt = 0;
  std::string_view name, address;
};
struct HelloAck {
  std::uint64_t link = 0, incarnation = 0;  // link as in the hello; incarnation of whoever answers
  std::uint64_t next_sequence = 0;          // of the caller's notifications: everything below has arrived
  std::uint32_t path = 0, attempt = 0;
};
// A part of a notification. Those of one link are numbered; parts come in order.
struct Notify {
  std::uint64_t incarnation = 0, link = 0, sequence = 0, total = 0, offset = 0;
  std::string_view part;
};
struct Revoke {
  std::uint64_t incarnation = 0, region = 0;
};
// The other kinds. kPing: of the caller, with the number of notifications it has sent; kPong answers. kGap answers, too:
// notifications are missing. kClose: the caller's link ends. kBye: all that the sender has to do with anybody ends.
struct LinkWord {
  std::uint64_t incarnation = 0, link = 0, sequence = 0;
};

std::string encode(const ConnectionBytes&);
std::string encode(const RegionKey&);
std::string encode(const Hello&);
std::string encode(const HelloAck&);
std::string encode(const Notify&);
std::string encode(const Revoke&);
std::string encode(MessageKind kind, const LinkWord&);

// Of bytes that carry a checksum.
Result<ConnectionBytes> decode_connection(std::string_view bytes);
Result<RegionKey> decode_key(std::string_view bytes);
// Of a message: its kind is its first byte. Views point into `bytes`.
Result<Hello> decode_hello(std::string_view bytes);
Result<HelloAck> decode_ack(std::string_view bytes);
Result<Notify> decode_notify(std::string_view bytes);
Result<Revoke> decode_revoke(std::string_view bytes);
Result<LinkWord> decode_word(std::string_view bytes);

inline constexpr std::size_t kNotifyHeaderBytes = 1 + 5 * 8;

}  // namespace nixl::core::libfabric
