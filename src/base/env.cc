#include "base/env.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdlib>

namespace nixl::core {

std::optional<std::string> env_text(const char* name) {
  const char* value = std::getenv(name);
  if (!value || !*value) return std::nullopt;
  return std::string(value);
}

std::optional<bool> parse_bool(std::string_view text) {
  std::string word(text);
  std::transform(word.begin(), word.end(), word.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const char* yes : {"y", "yes", "on", "1", "true", "enable"})
    if (word == yes) return true;
  for (const char* no : {"n", "no", "off", "0", "false", "disable"})
    if (word == no) return false;
  return std::nullopt;
}

std::optional<std::int64_t> parse_int(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text.empty()) return std::nullopt;
  return value;
}

std::vector<std::string> parse_words(std::string_view text) {
  std::vector<std::string> words;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t start = std::min(text.find_first_not_of(", ", at), text.size());
    at = std::min(text.find_first_of(", ", start), text.size());
    if (at > start) words.emplace_back(text.substr(start, at - start));
  }
  return words;
}

Result<std::optional<bool>> env_bool(const char* name) {
  const auto text = env_text(name);
  if (!text) return std::optional<bool>();
  if (auto value = parse_bool(*text)) return value;
  return fail(Code::kInvalidArgument,
              "environment variable %s is '%s'; allowed: y yes on 1 true enable n no off 0 false disable", name,
              text->c_str());
}

Result<std::optional<std::int64_t>> env_int(const char* name) {
  const auto text = env_text(name);
  if (!text) return std::optional<std::int64_t>();
  if (auto value = parse_int(*text)) return value;
  return fail(Code::kInvalidArgument, "environment variable %s is '%s'; a decimal integer is needed", name,
              text->c_str());
}

}  // namespace nixl::core
