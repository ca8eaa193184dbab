#include "agent/seal.h"

#include <random>

#include "base/bytes.h"
#include "base/sha256.h"

namespace nixl::core {
namespace {
constexpr std::size_t kLengthBytes = 8, kMacBytes = 32;
}

std::string Seal::nonce() {
  std::random_device random;
  ByteWriter out;
  for (std::size_t i = 0; i < kNonceBytes / 4; ++i) out.put<std::uint32_t>(random());
  return out.take();
}

std::string Seal::mac(Side from, std::uint64_t count, std::string_view payload) const {
  ByteWriter text;
  text.put(static_cast<char>(from));
  text.put_raw(nonces_);
  text.put(count);
  text.put_raw(payload);
  return hmac_sha256(secret_, text.bytes());
}

std::string Seal::close(std::string_view frame) {
  const std::string_view payload = frame.substr(kLengthBytes);
  return encode_frame(Verb::kSealed, mac(side_, num_sent_++, payload) + std::string(payload));
}

Result<Frame> Seal::open(const Frame& sealed) {
  if (sealed.verb != Verb::kSealed || sealed.body.size() < kMacBytes)
    return fail(Code::kMismatch, "a frame without the proof that its sender knows NIXL_LISTEN_SECRET");
  const std::string_view payload = std::string_view(sealed.body).substr(kMacBytes);
  const Side from = side_ == Side::kCaller ? Side::kListener : Side::kCaller;
  const std::string expected = mac(from, num_received_++, payload);
  int differing = 0;  // all bytes are compared: the time tells nothing
  for (std::size_t i = 0; i < kMacBytes; ++i) differing |= expected[i] ^ sealed.body[i];
  if (differing)
    return fail(Code::kMismatch, "NIXL_LISTEN_SECRET differs on the other side, or the frame was changed on its way");
  return decode_payload(payload);
}

}  // namespace nixl::core
