#include "agent/settings.h"

#include <cctype>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/env.h"

namespace nixl::core {
namespace {

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.remove_suffix(1);
  return text;
}

// The value of `key = value`: a quoted string, or a bare number or boolean; a comment may follow.
Result<std::string> value_of(std::string_view text) {
  std::string value;
  if (!text.empty() && (text[0] == '"' || text[0] == '\'')) {
    const char quote = text[0];
    std::size_t at = 1;
    for (; at < text.size() && text[at] != quote; ++at) {
      if (text[at] != '\\' || quote == '\'') {
        value += text[at];
        continue;
      }
      if (++at == text.size()) break;
      const std::string_view from = "\"\\nt", to = "\"\\\n\t";
      const auto escape = from.find(text[at]);
      if (escape == std::string_view::npos) return fail(Code::kMismatch, "escape \\%c is not supported", text[at]);
      value += to[escape];
    }
    if (at >= text.size()) return fail(Code::kMismatch, "the string is not closed");
    text = trimmed(text.substr(at + 1));
    if (!text.empty() && text[0] != '#') return fail(Code::kMismatch, "text follows the string");
    return value;
  }
  value = std::string(trimmed(text.substr(0, text.find('#'))));
  if (value.empty()) return fail(Code::kMismatch, "there is no value");
  if (value != "true" && value != "false" && !parse_int(value))
    return fail(Code::kMismatch, "'%s' is no string in quotes, number, true or false", value.c_str());
  return value;
}

}  // namespace

Result<Settings> Settings::parse(std::string_view text, const std::string& origin) {
  Settings settings;
  settings.origin_ = origin;
  bool top_level = true;
  int number = 0;
  while (!text.empty()) {
    ++number;
    const auto end = text.find('\n');
    const std::string_view line = trimmed(text.substr(0, end));
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
    if (line.empty() || line[0] == '#') continue;
    if (line[0] == '[') {
      if (line.back() != ']' && line.find("] #") == std::string_view::npos)
        return fail(Code::kMismatch, "%s line %d: the table name is not closed", origin.c_str(), number);
      top_level = false;
      continue;
    }
    const auto equals = line.find('=');
    const std::string_view key = trimmed(line.substr(0, equals));
    if (equals == std::string_view::npos || key.empty())
      return fail(Code::kMismatch, "%s line %d: 'name = value' is needed", origin.c_str(), number);
    auto value = value_of(trimmed(line.substr(equals + 1)));
    if (!value) return fail(Code::kMismatch, "%s line %d: %s", origin.c_str(), number, value.error().reason.c_str());
    if (top_level) settings.file_[std::string(key)] = std::move(*value);
  }
  return settings;
}

Result<Settings> Settings::read() {
  const auto named = env_text("NIXL_CONFIG_FILE");
  const auto home = env_text("HOME");
  for (const std::string& path : {named.value_or(""), home ? *home + "/.nixl.cfg" : "", std::string("/etc/nixl.cfg")}) {
    if (path.empty()) continue;
    std::error_code ignored;
    std::ifstream file(path);
    if (!file || std::filesystem::is_directory(path, ignored)) {
      if (named && path == *named)
        return fail(Code::kIo, "NIXL_CONFIG_FILE=%s cannot be read; the path of a TOML file is needed", path.c_str());
      continue;
    }
    std::ostringstream text;
    text << file.rdbuf();
    return parse(text.str(), path);
  }
  return Settings();
}

std::optional<std::string> Settings::text(const std::string& name) const {
  if (auto value = env_text(name.c_str())) return value;
  const auto found = file_.find(name);
  if (found == file_.end() || found->second.empty()) return std::nullopt;
  return found->second;
}

Result<std::optional<bool>> Settings::flag(const std::string& name) const {
  const auto value = text(name);
  if (!value) return std::optional<bool>();
  if (const auto parsed = parse_bool(*value)) return parsed;
  return fail(Code::kInvalidArgument, "%s is '%s'; allowed: y yes on 1 true enable, n no off 0 false disable",
              name.c_str(), value->c_str());
}

Result<std::optional<std::int64_t>> Settings::number(const std::string& name) const {
  const auto value = text(name);
  if (!value) return std::optional<std::int64_t>();
  if (const auto parsed = parse_int(*value)) return parsed;
  return fail(Code::kInvalidArgument, "%s is '%s'; a whole number is needed", name.c_str(), value->c_str());
}

}  // namespace nixl::core
