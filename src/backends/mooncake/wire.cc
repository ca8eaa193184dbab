#include "backends/mooncake/wire.h"

#include <arpa/inet.h>

#include "base/bytes.h"

namespace nixl::core::mooncake {
namespace {

constexpr std::uint32_t kMark = 0x4d4e584e;  // "NXNM"
constexpr std::uint16_t kVersion = 1;
constexpr std::size_t kMaxText = 512;

Result<std::string> text_of(ByteReader& in) {
  NIXL_ASSIGN(const auto text, in.get_text(kMaxText));
  return std::string(text);
}

}  // namespace

bool is_numeric_address(const std::string& text) {
  in6_addr raw;
  return ::inet_pton(AF_INET, text.c_str(), &raw) == 1 || ::inet_pton(AF_INET6, text.c_str(), &raw) == 1;
}

std::string Contact::encode() const {
  ByteWriter out;
  out.put_all(kMark, kVersion, incarnation);
  out.put_text(address);
  out.put(port);
  out.put_text(segment);
  out.put_text(protocol);
  return out.take();
}

Result<Contact> Contact::decode(std::string_view bytes) {
  ByteReader in(bytes);
  NIXL_ASSIGN(const auto mark, in.get<std::uint32_t>());
  NIXL_ASSIGN(const auto version, in.get<std::uint16_t>());
  if (mark != kMark) return fail(Code::kMismatch, "these bytes are no Mooncake connection of this library");
  if (version != kVersion)
    return fail(Code::kUnsupported, "Mooncake connection of version %u; this library speaks version %u", version,
                kVersion);
  Contact contact;
  NIXL_ASSIGN(contact.incarnation, in.get<std::uint64_t>());
  NIXL_ASSIGN(contact.address, text_of(in));
  NIXL_ASSIGN(contact.port, in.get<std::uint16_t>());
  NIXL_ASSIGN(contact.segment, text_of(in));
  NIXL_ASSIGN(contact.protocol, text_of(in));
  if (in.left() != 0) return fail(Code::kMismatch, "Mooncake connection with %zu bytes too many", in.left());
  if (!is_numeric_address(contact.address) || contact.port == 0)
    return fail(Code::kMismatch, "Mooncake connection with the address '%s', port %u", contact.address.c_str(),
                contact.port);
  return contact;
}

std::string Hello::encode() const {
  ByteWriter out;
  out.put_all(kMark, kVersion, wanted_incarnation, caller.incarnation);
  out.put_text(caller.name);
  return frame_of(FrameKind::kHello, out.bytes());
}

Result<Hello> Hello::decode(std::string_view frame) {
  NIXL_ASSIGN(const FrameKind kind, kind_of(frame));
  if (kind != FrameKind::kHello) return fail(Code::kMismatch, "a caller that does not say hello");
  ByteReader in(body_of(frame));
  NIXL_ASSIGN(const auto mark, in.get<std::uint32_t>());
  NIXL_ASSIGN(const auto version, in.get<std::uint16_t>());
  if (mark != kMark || version != kVersion) return fail(Code::kMismatch, "a hello of another kind or version");
  Hello hello;
  NIXL_TRY(in.get_all(hello.wanted_incarnation, hello.caller.incarnation));
  NIXL_ASSIGN(const auto name, in.get_text(std::size_t{1} << 16));
  hello.caller.name = name;
  return hello;
}

std::string frame_of(FrameKind kind, std::string_view body) {
  std::string frame(1, static_cast<char>(kind));
  frame.append(body);
  return frame;
}

Result<FrameKind> kind_of(std::string_view frame) {
  if (frame.empty() || frame[0] < 1 || frame[0] > 4) return fail(Code::kMismatch, "a frame of unknown kind");
  return static_cast<FrameKind>(frame[0]);
}

}  // namespace nixl::core::mooncake
