#include "backends/libfabric/messages.h"

namespace nixl::core::libfabric {
namespace {

Result<void> check_version(ByteReader& in) {
  NIXL_ASSIGN(const auto version, in.get<std::uint32_t>());
  if (version != kMessageVersion)
    return fail(Code::kMismatch, "LIBFABRIC bytes of version 0x%x, this side speaks 0x%x", version, kMessageVersion);
  return {};
}

ByteWriter message(MessageKind kind) {
  ByteWriter out;
  out.put(static_cast<std::uint8_t>(kind));
  return out;
}

}  // namespace

std::string encode(const ConnectionBytes& connection) {
  ByteWriter out;
  out.put(kMessageVersion);
  out.put_text(connection.provider);
  out.put_all(connection.address_format, static_cast<std::uint8_t>(connection.driven),
              static_cast<std::uint32_t>(connection.rails.size()));
  for (const RailAddress& rail : connection.rails) {
    out.put_text(rail.fabric);
    out.put_text(rail.address);
  }
  return sealed(out.take());
}

Result<ConnectionBytes> decode_connection(std::string_view bytes) {
  NIXL_ASSIGN(const std::string_view content, unsealed(bytes, "LIBFABRIC"));
  ByteReader in(content);
  NIXL_TRY(check_version(in));
  ConnectionBytes connection;
  NIXL_ASSIGN(connection.provider, in.get_text(kMaxNameBytes));
  std::uint8_t driven = 0;
  std::uint32_t num_rails = 0;
  NIXL_TRY(in.get_all(connection.address_format, driven, num_rails));
  connection.driven = driven != 0;
  if (num_rails == 0 || num_rails > kMaxRailsOfPeer)
    return fail(Code::kMismatch, "%u rails, 1 to %u are possible", num_rails, kMaxRailsOfPeer);
  for (std::uint32_t i = 0; i < num_rails; ++i) {
    NIXL_ASSIGN(const std::string_view fabric, in.get_text(kMaxNameBytes));
    NIXL_ASSIGN(const std::string_view address, in.get_text(kMaxAddressBytes));
    connection.rails.push_back({std::string(fabric), std::string(address)});
  }
  return connection;
}

std::string encode(const RegionKey& key) {
  ByteWriter out;
  out.put_all(kMessageVersion, key.id, static_cast<std::uint32_t>(key.rails.size()));
  for (const auto& rail : key.rails) out.put_all(rail.key, rail.base);
  return sealed(out.take());
}

Result<RegionKey> decode_key(std::string_view bytes) {
  NIXL_ASSIGN(const std::string_view content, unsealed(bytes, "LIBFABRIC"));
  ByteReader in(content);
  NIXL_TRY(check_version(in));
  RegionKey key;
  std::uint32_t num_rails = 0;
  NIXL_TRY(in.get_all(key.id, num_rails));
  if (num_rails == 0 || num_rails > kMaxRailsOfPeer)
    return fail(Code::kMismatch, "region key for %u rails, 1 to %u are possible", num_rails, kMaxRailsOfPeer);
  key.rails.resize(num_rails);
  for (auto& rail : key.rails) NIXL_TRY(in.get_all(rail.key, rail.base));
  if (in.left() != 0) return fail(Code::kMismatch, "region key of %zu bytes is not whole", bytes.size());
  return key;
}

std::string encode(const Hello& hello) {
  ByteWriter out = message(MessageKind::kHello);
  out.put_all(kMessageVersion, hello.expected_incarnation, hello.incarnation, hello.link, hello.path, hello.attempt);
  out.put_text(hello.name);
  out.put_text(hello.address);
  return out.take();
}
Result<Hello> decode_hello(std::string_view bytes) {
  ByteReader in(bytes.substr(1));
  NIXL_TRY(check_version(in));
  Hello hello;
  NIXL_TRY(in.get_all(hello.expected_incarnation, hello.incarnation, hello.link, hello.path, hello.attempt));
  NIXL_ASSIGN(hello.name, in.get_text(kMaxNameBytes));
  NIXL_ASSIGN(hello.address, in.get_text(kMaxAddressBytes));
  return hello;
}

std::string encode(const HelloAck& ack) {
  ByteWriter out = message(MessageKind::kHelloAck);
  out.put_all(ack.link, ack.incarnation, ack.next_sequence, ack.path, ack.attempt);
  return out.take();
}
Result<HelloAck> decode_ack(std::string_view bytes) {
  ByteReader in(bytes.substr(1));
  HelloAck ack;
  NIXL_TRY(in.get_all(ack.link, ack.incarnation, ack.next_sequence, ack.path, ack.attempt));
  return ack;
}

std::string encode(const Notify& notify) {
  ByteWriter out = message(MessageKind::kNotify);
  out.put_all(notify.incarnation, notify.link, notify.sequence, notify.total, notify.offset);
  out.put_raw(notify.part);
  return out.take();
}
Result<Notify> decode_notify(std::string_view bytes) {
  ByteReader in(bytes.substr(1));
  Notify notify;
  NIXL_TRY(in.get_all(notify.incarnation, notify.link, notify.sequence, notify.total, notify.offset));
  NIXL_ASSIGN(notify.part, in.get_raw(in.left()));
  if (notify.total > kMaxNotificationBytes || notify.offset > notify.total ||
      notify.part.size() > notify.total - notify.offset)
    return fail(Code::kMismatch, "part of %zu bytes at %llu of a notification of %llu", notify.part.size(),
                static_cast<unsigned long long>(notify.offset), static_cast<unsigned long long>(notify.total));
  return notify;
}

std::string encode(const Revoke& revoke) {
  ByteWriter out = message(MessageKind::kRevoke);
  out.put_all(revoke.incarnation, revoke.region);
  return out.take();
}
Result<Revoke> decode_revoke(std::string_view bytes) {
  ByteReader in(bytes.substr(1));
  Revoke revoke;
  NIXL_TRY(in.get_all(revoke.incarnation, revoke.region));
  return revoke;
}

std::string encode(MessageKind kind, const LinkWord& word) {
  ByteWriter out = message(kind);
  out.put_all(word.incarnation, word.link, word.sequence);
  return out.take();
}
Result<LinkWord> decode_word(std::string_view bytes) {
  ByteReader in(bytes.substr(1));
  LinkWord word;
  NIXL_TRY(in.get_all(word.incarnation, word.link, word.sequence));
  return word;
}

}  // namespace nixl::core::libfabric
