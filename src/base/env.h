// Environment variables with the project's rules for words and numbers. A value that does not parse is an error naming
// the variable, the value seen and the values allowed; unset or empty is nullopt.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"

namespace nixl::core {

std::optional<std::string> env_text(const char* name);
Result<std::optional<bool>> env_bool(const char* name);  // y yes on 1 true enable / n no off 0 false disable, any case
Result<std::optional<std::int64_t>> env_int(const char* name);  // whole value must be a decimal integer

std::optional<bool> parse_bool(std::string_view text);
std::optional<std::int64_t> parse_int(std::string_view text);
std::vector<std::string> parse_words(std::string_view text);  // with commas or blanks between them; none is empty

}  // namespace nixl::core
