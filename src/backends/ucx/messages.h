// Active messages between two backends; docs/ucx_messages.md gives the layout. Bytes arrive from outside: decoding
// checks them.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/result.h"

namespace nixl::core::ucx {

enum MessageId : unsigned { kHello = 1, kHelloAck, kNotify, kReadRequest, kReadDone, kRevoke, kBye, kNumMessageIds };

inline constexpr std::uint32_t kMessageVersion =
    0x4e585501;  // "NXU", version 1: first word of the connection bytes and of a hello
inline constexpr std::size_t kMaxAddressBytes = 64 << 10, kMaxNameBytes = 4 << 10, kMaxKeyBytes = 64 << 10;
inline constexpr std::uint32_t kMaxReadPieces = 4096;

// First message on a link: who calls, whom it expects to find, and how to answer.
struct Hello {
  std::uint64_t expected_incarnation = 0, incarnation = 0, link = 0;
  std::string name, address;
};
struct HelloAck {
  std::uint64_t link = 0, incarnation = 0;  // link as in the hello; incarnation of whoever answers
  std::uint64_t next_sequence = 0;          // of the caller's notifications: everything below has arrived
};
// `stream` and `sequence` restore the order of one sender where fragments travel over several rails.
struct Notify {
  std::uint64_t incarnation = 0, stream = 0, sequence = 0;
  std::string_view name, text;
};
struct ReadPiece {
  std::uint64_t region = 0;       // of the owner who is asked
  std::uint64_t source = 0;       // address there
  std::uint64_t destination = 0;  // address at the asker
  std::uint64_t length = 0;
  std::uint32_t key = 0;  // index into the keys of the message
};
// Asks the owner of memory to put pieces into the asker's memory: reading at the speed of writing where a transport has
// no get.
struct ReadRequest {
  std::uint64_t incarnation = 0, link = 0, request = 0;
  std::vector<std::string_view> keys;
  std::vector<ReadPiece> pieces;
};
struct ReadDone {
  std::uint64_t request = 0;
  std::uint32_t code = 0;  // 0 done, else 1 + Code
  std::string_view reason;
};
struct Revoke {
  std::uint64_t incarnation = 0, region = 0;
};
// The sender closes: its links are about to end, and nothing is wrong.
struct Bye {
  std::uint64_t incarnation = 0;
};

std::string encode(const Hello&);
std::string encode(const HelloAck&);
std::string encode(const Notify&);
std::string encode(const ReadRequest&);
std::string encode(const ReadDone&);
std::string encode(const Revoke&);
std::string encode(const Bye&);

// Views in a decoded message point into `bytes`.
Result<void> decode(std::string_view bytes, Hello& out);
Result<void> decode(std::string_view bytes, HelloAck& out);
Result<void> decode(std::string_view bytes, Notify& out);
Result<void> decode(std::string_view bytes, ReadRequest& out);
Result<void> decode(std::string_view bytes, ReadDone& out);
Result<void> decode(std::string_view bytes, Revoke& out);
Result<void> decode(std::string_view bytes, Bye& out);

}  // namespace nixl::core::ucx
