#include "stores/tcp/protocol.h"

#include "base/bytes.h"

namespace nixl::core::tcp_store {
namespace {

void put_text(ByteWriter& out, std::string_view text) {
  out.put(static_cast<std::uint64_t>(text.size()));
  out.put_raw(text);
}

// Reads a request that may not have arrived whole; `incomplete` tells that more bytes are needed.
class Parser {
 public:
  explicit Parser(std::string_view input) : in_(input) {}

  template <typename T>
  Result<T> number() {
    if (in_.left() < sizeof(T)) return wait<T>();
    return in_.get<T>();
  }
  Result<std::string> text(std::size_t limit) {
    NIXL_ASSIGN(const auto size, number<std::uint64_t>());
    if (size > limit)
      return fail(Code::kMismatch, "a text of %llu bytes; at most %zu are accepted",
                  static_cast<unsigned long long>(size), limit);
    if (in_.left() < size) return wait<std::string>();
    return std::string(*in_.get_raw(size));
  }
  bool incomplete() const { return incomplete_; }
  std::size_t used() const { return in_.offset(); }

 private:
  template <typename T>
  Result<T> wait() {
    incomplete_ = true;
    return fail(Code::kAgain, "incomplete");
  }
  ByteReader in_;
  bool incomplete_ = false;
};

Result<Request> parse(Parser& in) {
  Request request;
  NIXL_ASSIGN(const auto verb, in.number<std::uint8_t>());
  request.verb = static_cast<Verb>(verb);
  std::uint64_t num_keys = 1;
  switch (request.verb) {
    case Verb::kValidate:
    case Verb::kPing: {
      NIXL_ASSIGN(request.number, in.number<std::uint32_t>());
      return request;
    }
    case Verb::kCheck: {
      NIXL_ASSIGN(num_keys, in.number<std::uint64_t>());
      break;
    }
    case Verb::kSet:
    case Verb::kGet:
    case Verb::kDeleteKey:
      break;
    default:
      return fail(Code::kMismatch, "request %u is not served here", verb);
  }
  if (num_keys > kMaxKeys)
    return fail(Code::kMismatch, "a check of %llu keys; at most %zu are accepted",
                static_cast<unsigned long long>(num_keys), kMaxKeys);
  for (std::uint64_t i = 0; i < num_keys; ++i) {
    NIXL_ASSIGN(std::string key, in.text(kMaxKeyBytes));
    request.keys.push_back(std::move(key));
  }
  if (request.verb == Verb::kSet) {
    NIXL_ASSIGN(request.value, in.text(kMaxValueBytes));
  }
  return request;
}

}  // namespace

std::string encode(const Request& request) {
  ByteWriter out;
  out.put(static_cast<std::uint8_t>(request.verb));
  if (request.verb == Verb::kValidate || request.verb == Verb::kPing) out.put(request.number);
  if (request.verb == Verb::kCheck) out.put(static_cast<std::uint64_t>(request.keys.size()));
  for (const std::string& key : request.keys) put_text(out, key);
  if (request.verb == Verb::kSet) put_text(out, request.value);
  return out.take();
}

Result<std::optional<Parsed>> parse_request(std::string_view input) {
  Parser in(input);
  auto request = parse(in);
  if (request) return Parsed{std::move(*request), in.used()};
  if (in.incomplete()) return std::nullopt;
  return fail(std::move(request).error());
}

std::string encode_text(std::string_view text) {
  ByteWriter out;
  put_text(out, text);
  return out.take();
}

}  // namespace nixl::core::tcp_store
