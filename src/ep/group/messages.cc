#include "ep/group/messages.h"

#include "base/bytes.h"

namespace nixl::core::ep {
namespace {

constexpr std::uint32_t kMagic = 0x5045584e;  // "NXEP"
constexpr std::uint16_t kVersion = 1;
constexpr std::size_t kMaxText = 4096;

enum class Kind : std::uint8_t { kHello = 1, kMemory, kAttached, kReady, kAbort };

template <typename... Fs>
struct Overloaded : Fs... {
  using Fs::operator()...;
};

void put_stamp(ByteWriter& out) {
  out.put_all(kMagic, kVersion);
}

Result<void> check_stamp(ByteReader& in, const char* what) {
  NIXL_ASSIGN(const auto magic, in.get<std::uint32_t>());
  NIXL_ASSIGN(const auto version, in.get<std::uint16_t>());
  if (magic != kMagic)
    return fail(Code::kMismatch, "%s: mark %#x instead of %#x: written by another program", what, magic, kMagic);
  if (version != kVersion)
    return fail(Code::kMismatch, "%s: protocol version %u, this library speaks %u: use one version on all ranks", what,
                version, kVersion);
  return {};
}

Result<std::string> get_text(ByteReader& in, std::size_t limit = kMaxText) {
  NIXL_ASSIGN(const std::string_view text, in.get_text(limit));
  return std::string(text);
}

Result<LinkMessage> parse_hello(ByteReader& in) {
  NIXL_TRY(check_stamp(in, "hello of a caller"));
  Hello hello;
  NIXL_ASSIGN(hello.rank, in.get<std::int32_t>());
  NIXL_ASSIGN(hello.incarnation, in.get<std::uint32_t>());
  NIXL_ASSIGN(hello.called_rank, in.get<std::int32_t>());
  NIXL_ASSIGN(hello.called_incarnation, in.get<std::uint32_t>());
  return hello;
}

Result<LinkMessage> parse_memory(ByteReader& in) {
  Memory memory;
  NIXL_ASSIGN(memory.experts_per_rank, in.get<std::int32_t>());
  NIXL_ASSIGN(memory.description, get_text(in, kMaxMessageBytes));
  return memory;
}

}  // namespace

std::string store_key(int rank) {
  return "NIXL_EP/" + std::to_string(rank);
}

std::string encode(const Card& card) {
  ByteWriter out;
  put_stamp(out);
  out.put_all(static_cast<std::int32_t>(card.rank), card.incarnation, card.pid);
  for (const std::string* text : {&card.host, &card.place.boot_id, &card.place.network_namespace, &card.socket})
    out.put_text(*text);
  return out.take();
}

Result<Card> parse_card(std::string_view bytes) {
  ByteReader in(bytes);
  NIXL_TRY(check_stamp(in, "card in the store"));
  Card card;
  NIXL_TRY(in.get_all(card.rank, card.incarnation, card.pid));
  for (std::string* text : {&card.host, &card.place.boot_id, &card.place.network_namespace, &card.socket}) {
    NIXL_ASSIGN(*text, get_text(in));
  }
  return card;
}

std::string encode(const LinkMessage& message) {
  ByteWriter out;
  const auto kind = [&](Kind value) { out.put(static_cast<std::uint8_t>(value)); };
  std::visit(Overloaded{
                 [&](const Hello& hello) {
                   kind(Kind::kHello);
                   put_stamp(out);
                   out.put_all(static_cast<std::int32_t>(hello.rank), hello.incarnation,
                               static_cast<std::int32_t>(hello.called_rank), hello.called_incarnation);
                 },
                 [&](const Memory& memory) {
                   kind(Kind::kMemory);
                   out.put(static_cast<std::int32_t>(memory.experts_per_rank));
                   out.put_text(memory.description);
                 },
                 [&](const Attached&) { kind(Kind::kAttached); },
                 [&](const Ready&) { kind(Kind::kReady); },
                 [&](const Abort& abort) {
                   kind(Kind::kAbort);
                   out.put_text(std::string_view(abort.reason).substr(0, kMaxText));
                 },
             },
             message);
  return out.take();
}

Result<LinkMessage> parse_message(std::string_view bytes) {
  ByteReader in(bytes);
  NIXL_ASSIGN(const auto kind, in.get<std::uint8_t>());
  switch (static_cast<Kind>(kind)) {
    case Kind::kHello:
      return parse_hello(in);
    case Kind::kMemory:
      return parse_memory(in);
    case Kind::kAttached:
      return Attached{};
    case Kind::kReady:
      return Ready{};
    case Kind::kAbort: {
      NIXL_ASSIGN(std::string reason, get_text(in));
      return Abort{std::move(reason)};
    }
  }
  return fail(Code::kMismatch, "message of kind %u; 1 to %d are known", kind, static_cast<int>(Kind::kAbort));
}

}  // namespace nixl::core::ep
