// SHA-256 and HMAC-SHA-256 (FIPS 180-4, RFC 2104). Digests are 32 raw bytes.
#pragma once
#include <string>
#include <string_view>

namespace nixl::core {

std::string sha256(std::string_view bytes);
std::string hmac_sha256(std::string_view key, std::string_view bytes);

}  // namespace nixl::core
