#include "agent/frames.h"

#include "base/bytes.h"

namespace nixl::core {
namespace {
constexpr std::string_view kVerbs[] = {"NIXLCOMM:LOAD", "NIXLCOMM:SEND", "NIXLCOMM:INVL", "NIXLCOMM:HELO",
                                       "NIXLCOMM:SEAL"};
constexpr std::size_t kVerbBytes = 13;

Result<Verb> verb_of(std::string_view payload) {
  for (std::size_t i = 0; i < std::size(kVerbs); ++i)
    if (payload.starts_with(kVerbs[i])) return static_cast<Verb>(i);
  return fail(Code::kMismatch, "a frame that does not begin with NIXLCOMM:LOAD, SEND, INVL, HELO or SEAL");
}
}  // namespace

std::string encode_frame(Verb verb, std::string_view body) {
  ByteWriter out;
  out.put<std::uint64_t>(kVerbBytes + body.size());
  out.put_raw(kVerbs[static_cast<int>(verb)]);
  out.put_raw(body);
  return out.take();
}

Result<Frame> decode_payload(std::string_view payload) {
  NIXL_ASSIGN(const Verb verb, verb_of(payload));
  return Frame{verb, std::string(payload.substr(kVerbBytes))};
}

Result<std::optional<Frame>> FrameReader::next() {
  ByteReader in(input_);
  const auto length = in.get<std::uint64_t>();
  if (!length) return std::optional<Frame>();
  if (*length < kVerbBytes || *length > kMaxFrameBytes)
    return fail(Code::kMismatch, "frame of %llu bytes; allowed are %zu to %zu",
                static_cast<unsigned long long>(*length), kVerbBytes, kMaxFrameBytes);
  if (in.left() >= kVerbBytes || in.left() >= *length) {
    const std::string_view rest = std::string_view(input_).substr(in.offset());
    NIXL_TRY(verb_of(rest));
    if (in.left() < *length) return std::optional<Frame>();
    NIXL_ASSIGN(Frame frame, decode_payload(rest.substr(0, *length)));
    input_.erase(0, in.offset() + *length);
    return std::optional<Frame>(std::move(frame));
  }
  return std::optional<Frame>();
}

}  // namespace nixl::core
