#include "agent/frames.h"

#include "base/bytes.h"

namespace nixl::core {
namespace {
constexpr std::string_view kVerbs[] = {"NIXLCOMM:LOAD", "NIXLCOMM:SEND", "NIXLCOMM:INVL"};
constexpr std::size_t kVerbBytes = 13;
}  // namespace

std::string encode_frame(Verb verb, std::string_view body) {
  ByteWriter out;
  out.put<std::uint64_t>(kVerbBytes + body.size());
  out.put_raw(kVerbs[static_cast<int>(verb)]);
  out.put_raw(body);
  return out.take();
}

Result<std::optional<Frame>> FrameReader::next() {
  ByteReader in(input_);
  const auto length = in.get<std::uint64_t>();
  if (!length) return std::optional<Frame>();
  if (*length < kVerbBytes || *length > kMaxFrameBytes)
    return fail(Code::kMismatch, "frame of %llu bytes; allowed are %zu to %zu", static_cast<unsigned long long>(*length),
                kVerbBytes, kMaxFrameBytes);
  if (in.left() >= kVerbBytes || in.left() >= *length) {
    const std::string_view verb = std::string_view(input_).substr(in.offset(), kVerbBytes);
    int found = -1;
    for (int i = 0; i < 3; ++i)
      if (verb == kVerbs[i]) found = i;
    if (found < 0) return fail(Code::kMismatch, "a frame that does not begin with NIXLCOMM:LOAD, SEND or INVL");
    if (in.left() < *length) return std::optional<Frame>();
    Frame frame{static_cast<Verb>(found), input_.substr(in.offset() + kVerbBytes, *length - kVerbBytes)};
    input_.erase(0, in.offset() + *length);
    return std::optional<Frame>(std::move(frame));
  }
  return std::optional<Frame>();
}

}  // namespace nixl::core
