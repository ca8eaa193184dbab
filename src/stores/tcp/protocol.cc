#include "stores/tcp/protocol.h"

#include "base/bytes.h"

namespace nixl::core::tcp_store {
namespace {
constexpr std::uint16_t kVersion = 1;
}

std::string encode(const Request& request) {
  ByteWriter out;
  out.put(kVersion);
  out.put(static_cast<std::uint8_t>(request.verb));
  out.put_text(request.key);
  out.put_text(request.value);
  out.put(request.wait_ns);
  return out.take();
}

Result<Request> parse_request(std::string_view bytes) {
  ByteReader in(bytes);
  NIXL_ASSIGN(const auto version, in.get<std::uint16_t>());
  if (version != kVersion)
    return fail(Code::kMismatch, "request of version %u, this store speaks %u", version, kVersion);
  NIXL_ASSIGN(const auto verb, in.get<std::uint8_t>());
  if (verb < 1 || verb > 3) return fail(Code::kMismatch, "request %u; 1 to 3 are known", verb);
  Request request;
  request.verb = static_cast<Verb>(verb);
  NIXL_ASSIGN(request.key, in.get_text(kMaxKeyBytes));
  NIXL_ASSIGN(request.value, in.get_text(kMaxValueBytes));
  NIXL_ASSIGN(request.wait_ns, in.get<Nanoseconds>());
  return request;
}

std::string encode(const Answer& answer) {
  ByteWriter out;
  out.put(static_cast<std::uint8_t>(answer.found));
  out.put_text(answer.value);
  return out.take();
}

Result<Answer> parse_answer(std::string_view bytes) {
  ByteReader in(bytes);
  NIXL_ASSIGN(const auto found, in.get<std::uint8_t>());
  Answer answer;
  answer.found = found != 0;
  NIXL_ASSIGN(answer.value, in.get_text(kMaxValueBytes));
  return answer;
}

}  // namespace nixl::core::tcp_store
