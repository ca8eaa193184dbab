#include "backends/storage/parameters.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/env.h"
#include "base/log.h"

namespace nixl::core {

tl::unexpected<Error> Parameters::bad(const char* key, const std::string& value, const std::string& needed) const {
  return fail(Code::kInvalidArgument, "%s parameter %s is '%s': %s is needed", backend_, key, value.c_str(),
              needed.c_str());
}

std::string Parameters::text(const char* key, const char* variable) const {
  const auto found = params_.find(key);
  if (found != params_.end() && !found->second.empty()) return found->second;
  return variable ? env_text(variable).value_or("") : "";
}

Result<std::string> Parameters::readable_file(const char* key, const char* variable) const {
  std::string path = text(key, variable);
  if (!path.empty() && ::access(path.c_str(), R_OK) != 0)
    return fail(errno_error(std::string(backend_) + " parameter " + key + ": " + path, errno));
  return path;
}

Result<bool> Parameters::flag(const char* key) const {
  const std::string value = text(key);
  if (value.empty()) return false;
  const auto parsed = parse_bool(value);
  if (!parsed) return bad(key, value, "true or false");
  return *parsed;
}

Result<std::int64_t> Parameters::number(const char* key, std::int64_t fallback, std::int64_t least) const {
  const std::string value = text(key);
  if (value.empty()) return fallback;
  const auto parsed = parse_int(value);
  if (!parsed || *parsed < least) return bad(key, value, "a number >= " + std::to_string(least));
  return *parsed;
}

Result<std::int64_t> Parameters::clamped(const char* key, std::int64_t fallback, std::int64_t least,
                                         std::int64_t most) const {
  const std::string value = text(key);
  if (value.empty()) return fallback;
  const auto parsed = parse_int(value);
  if (!parsed) return bad(key, value, "a number from " + std::to_string(least) + " to " + std::to_string(most));
  const std::int64_t used = std::clamp(*parsed, least, most);
  if (used != *parsed)
    NIXL_WARN("%s parameter %s is %s, outside %lld to %lld: %lld is used", backend_, key, value.c_str(),
              static_cast<long long>(least), static_cast<long long>(most), static_cast<long long>(used));
  return used;
}

Result<std::string> Parameters::choice(const char* key, const char* first, const char* second) const {
  const std::string value = text(key);
  if (value.empty() || value == first) return std::string(first);
  if (value == second) return std::string(second);
  return bad(key, value, std::string(first) + " or " + second);
}

unsigned half_the_cores() {
  return static_cast<unsigned>(std::max(1l, ::sysconf(_SC_NPROCESSORS_ONLN) / 2));
}

}  // namespace nixl::core
