#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "base/result.h"

namespace nixl::core {

std::string_view name(Code code) noexcept {
  switch (code) {
    case Code::kInvalidArgument:
      return "invalid argument";
    case Code::kUnsupported:
      return "unsupported";
    case Code::kAgain:
      return "again";
    case Code::kNotFound:
      return "not found";
    case Code::kMismatch:
      return "mismatch";
    case Code::kNotAllowed:
      return "not allowed";
    case Code::kBusy:
      return "busy";
    case Code::kNotPosted:
      return "not posted";
    case Code::kPeerLost:
      return "peer lost";
    case Code::kTimeout:
      return "timeout";
    case Code::kCancelled:
      return "cancelled";
    case Code::kIo:
      return "io";
    case Code::kInternal:
      return "internal";
  }
  return "unknown";
}

Error within(std::string_view context, Error error) {
  error.reason.insert(0, std::string(context) + ": ");
  return error;
}

std::string errno_text(int value) {
  const char* symbol = strerrorname_np(value);
  const char* text = strerrordesc_np(value);
  return std::string(text ? text : "unknown error") + " (" + (symbol ? symbol : "errno") + ", " +
         std::to_string(value) + ")";
}

Error errno_error(std::string_view what, int value, Code code) {
  return {code, std::string(what) + ": " + errno_text(value)};
}

tl::unexpected<Error> fail(Code code, const char* format, ...) {
  va_list args;
  va_start(args, format);
  va_list again;
  va_copy(again, args);
  const int size = vsnprintf(nullptr, 0, format, args);
  va_end(args);
  std::string text(size > 0 ? size : 0, '\0');
  if (size > 0) vsnprintf(text.data(), text.size() + 1, format, again);
  va_end(again);
  return tl::unexpected<Error>(Error{code, std::move(text)});
}

}  // namespace nixl::core
