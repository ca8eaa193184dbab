// Settings of the core: an environment variable, else the same name at the top level of a configuration file (TOML):
// NIXL_CONFIG_FILE, else $HOME/.nixl.cfg, else /etc/nixl.cfg. Read anew for each agent.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "base/result.h"

namespace nixl::core {

class Settings {
 public:
  // A file that cannot be parsed, or one named by NIXL_CONFIG_FILE that cannot be read, is an error with its line.
  static Result<Settings> read();
  static Result<Settings> parse(std::string_view text, const std::string& origin);

  std::optional<std::string> text(const std::string& name) const;  // empty counts as unset
  Result<std::optional<bool>> flag(const std::string& name) const;
  Result<std::optional<std::int64_t>> number(const std::string& name) const;

 private:
  std::map<std::string, std::string, std::less<>> file_;
  std::string origin_;
};

}  // namespace nixl::core
