// Result<T>: a value, or an Error that says what went wrong and what a caller can do about it.
//
// Who first decides that something failed writes the reason (object, value seen, value allowed, what to do; for a vendor
// library its code and text); everyone above passes it on and may prepend context with `within`. Nobody logs on the way.
// "Not finished yet" is not an error: it is part of T.
#pragma once
#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

namespace nixl::core {

// What a caller can act on. Faces (C++, Python) map these to their own classes and never look at the text.
enum class Code {
  kInvalidArgument,  // the caller's values are wrong; retrying is useless
  kUnsupported,      // not possible with this build, backend or machine; the reason says what is missing
  kAgain,            // a bounded resource is full; retry later
  kNotFound,         // unknown name, key, region
  kMismatch,         // bytes from outside that are not what they should be (garbage, other version)
  kNotAllowed,       // forbidden in the present state
  kBusy,             // still running: repost or release refused
  kNotPosted,        // asked for the state of something never started
  kPeerLost,         // the other side died or was removed
  kTimeout,          // a deadline passed; the reason says who was waited for, what was expected, what was seen
  kCancelled,        // ended by the caller
  kIo,               // the system, a device or a server refused or failed
  kInternal,         // a defect of ours
};

std::string_view name(Code code) noexcept;

struct Error {
  Code code = Code::kInternal;
  std::string reason;
};

// "context: reason", same code.
Error within(std::string_view context, Error error);

// The text of an errno: "No space left on device (ENOSPC, 28)".
std::string errno_text(int value);

// An error from a failed system call: "what: <errno text>", code kIo unless given.
Error errno_error(std::string_view what, int value, Code code = Code::kIo);

template <typename T = void>
using Result = tl::expected<T, Error>;

// printf-like formatting of the reason. `return fail(Code::kIo, "open %s: %s", path, text);` converts to any Result<T>.
[[gnu::format(printf, 2, 3)]] tl::unexpected<Error> fail(Code code, const char* format, ...);
inline tl::unexpected<Error> fail(Error error) {
  return tl::unexpected<Error>(std::move(error));
}

}  // namespace nixl::core

// NIXL_TRY(expr): returns the error of a Result<void> expression from the enclosing function.
#define NIXL_TRY(expr)                                                                                \
  do {                                                                                                \
    if (auto nixl_try_ = (expr); !nixl_try_) return ::nixl::core::fail(std::move(nixl_try_).error()); \
  } while (0)

// NIXL_ASSIGN(auto x, expr): x = value of a Result<T> expression, or returns its error.
#define NIXL_CONCAT_(a, b) a##b
#define NIXL_CONCAT(a, b) NIXL_CONCAT_(a, b)
#define NIXL_ASSIGN(target, expr) NIXL_ASSIGN_(NIXL_CONCAT(nixl_result_, __LINE__), target, expr)
#define NIXL_ASSIGN_(temp, target, expr)                         \
  auto temp = (expr);                                            \
  if (!temp) return ::nixl::core::fail(std::move(temp).error()); \
  target = std::move(*temp)
