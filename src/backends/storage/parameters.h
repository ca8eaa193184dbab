// Parameters of a backend as words, flags and numbers; errors name the backend, the parameter, the value and what is
// allowed.
#pragma once
#include <cstdint>
#include <limits>
#include <string>

#include "base/result.h"
#include "contract/memory.h"

namespace nixl::core {

class Parameters {
 public:
  // Both outlive it. `backend`: the name for messages.
  Parameters(const char* backend, const Params& params) : backend_(backend), params_(params) {}

  // The value; where it is empty that of the environment variable, if one is named.
  std::string text(const char* key, const char* variable = nullptr) const;
  // As text(); a value must be the path of a file that can be read.
  Result<std::string> readable_file(const char* key, const char* variable = nullptr) const;
  Result<bool> flag(const char* key) const;  // empty: false
  // Empty: `fallback`. Anything but a number of at least `least` is an error.
  Result<std::int64_t> number(const char* key, std::int64_t fallback, std::int64_t least) const;
  // Empty: `fallback`. A number outside the range is brought into it, with a warning.
  Result<std::int64_t> clamped(const char* key, std::int64_t fallback, std::int64_t least, std::int64_t most) const;
  // One of two words; the first is what an empty value means.
  Result<std::string> choice(const char* key, const char* first, const char* second) const;

 private:
  tl::unexpected<Error> bad(const char* key, const std::string& value, const std::string& needed) const;
  const char* const backend_;
  const Params& params_;
};

// How many threads a backend takes where nothing else is asked for.
unsigned half_the_cores();

}  // namespace nixl::core
