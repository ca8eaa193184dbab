#include "backends/ucx/messages.h"

namespace nixl::core::ucx {

std::string encode(const Hello& hello) {
  ByteWriter out;
  out.put_all(kMessageVersion, hello.expected_incarnation, hello.incarnation, hello.link);
  out.put_text(hello.name);
  out.put_text(hello.address);
  return out.take();
}
Result<void> decode(std::string_view bytes, Hello& hello) {
  ByteReader in(bytes);
  std::uint32_t version = 0;
  NIXL_TRY(in.get_all(version, hello.expected_incarnation, hello.incarnation, hello.link));
  if (version != kMessageVersion)
    return fail(Code::kMismatch, "hello of version 0x%x, this side speaks 0x%x", version, kMessageVersion);
  NIXL_ASSIGN(hello.name, in.get_text(kMaxNameBytes));
  NIXL_ASSIGN(hello.address, in.get_text(kMaxAddressBytes));
  return {};
}

std::string encode(const HelloAck& ack) {
  ByteWriter out;
  out.put_all(ack.link, ack.incarnation, ack.next_sequence);
  return out.take();
}
Result<void> decode(std::string_view bytes, HelloAck& ack) {
  ByteReader in(bytes);
  return in.get_all(ack.link, ack.incarnation, ack.next_sequence);
}

std::string encode(const Notify& notify) {
  ByteWriter out;
  out.put_all(notify.incarnation, notify.stream, notify.sequence);
  out.put_text(notify.name);
  out.put_raw(notify.text);
  return out.take();
}
Result<void> decode(std::string_view bytes, Notify& notify) {
  ByteReader in(bytes);
  NIXL_TRY(in.get_all(notify.incarnation, notify.stream, notify.sequence));
  NIXL_ASSIGN(notify.name, in.get_text(kMaxNameBytes));
  NIXL_ASSIGN(notify.text, in.get_raw(in.left()));
  return {};
}

std::string encode(const ReadRequest& request) {
  ByteWriter out;
  out.put_all(request.incarnation, request.link, request.request, static_cast<std::uint32_t>(request.keys.size()));
  for (const std::string_view key : request.keys) out.put_text(key);
  out.put(static_cast<std::uint32_t>(request.pieces.size()));
  for (const ReadPiece& piece : request.pieces) {
    out.put_all(piece.region, piece.source, piece.destination, piece.length, piece.key);
  }
  return out.take();
}
Result<void> decode(std::string_view bytes, ReadRequest& request) {
  ByteReader in(bytes);
  std::uint32_t num_keys = 0, num_pieces = 0;
  NIXL_TRY(in.get_all(request.incarnation, request.link, request.request, num_keys));
  if (num_keys > kMaxReadPieces)
    return fail(Code::kMismatch, "read request with %u keys, at most %u", num_keys, kMaxReadPieces);
  for (std::uint32_t i = 0; i < num_keys; ++i) {
    NIXL_ASSIGN(const std::string_view key, in.get_text(kMaxKeyBytes));
    request.keys.push_back(key);
  }
  NIXL_TRY(in.get_all(num_pieces));
  if (num_pieces > kMaxReadPieces)
    return fail(Code::kMismatch, "read request with %u pieces, at most %u", num_pieces, kMaxReadPieces);
  request.pieces.resize(num_pieces);
  for (ReadPiece& piece : request.pieces) {
    NIXL_TRY(in.get_all(piece.region, piece.source, piece.destination, piece.length, piece.key));
    if (piece.key >= num_keys) return fail(Code::kMismatch, "read request names key %u of %u", piece.key, num_keys);
  }
  return {};
}

std::string encode(const ReadDone& done) {
  ByteWriter out;
  out.put_all(done.request, done.code);
  out.put_text(done.reason);
  return out.take();
}
Result<void> decode(std::string_view bytes, ReadDone& done) {
  ByteReader in(bytes);
  NIXL_TRY(in.get_all(done.request, done.code));
  NIXL_ASSIGN(done.reason, in.get_text(kMaxNameBytes));
  return {};
}

std::string encode(const Revoke& revoke) {
  ByteWriter out;
  out.put_all(revoke.incarnation, revoke.region);
  return out.take();
}
Result<void> decode(std::string_view bytes, Revoke& revoke) {
  ByteReader in(bytes);
  return in.get_all(revoke.incarnation, revoke.region);
}

std::string encode(const Bye& bye) {
  ByteWriter out;
  out.put(bye.incarnation);
  return out.take();
}
Result<void> decode(std::string_view bytes, Bye& bye) {
  ByteReader in(bytes);
  return in.get_all(bye.incarnation);
}

}  // namespace nixl::core::ucx
