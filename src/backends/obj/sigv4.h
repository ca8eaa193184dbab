// AWS Signature Version 4, as S3 wants it (the path is encoded once and not normalised).
#pragma once
#include <ctime>
#include <string>
#include <utility>
#include <vector>

namespace nixl::core::s3 {

struct Credentials {
  std::string access_key, secret_key, session_token;
};

struct ToSign {
  std::string method;
  std::string host;                                          // with the port, if it is not the scheme's own
  std::string path;                                          // encoded, begins with '/'
  std::vector<std::pair<std::string, std::string>> query;    // not encoded
  std::vector<std::pair<std::string, std::string>> headers;  // further ones to sign; names in lower case
  std::string payload_hash;                                  // hex of SHA-256, or "UNSIGNED-PAYLOAD"
  std::string region;
  std::time_t when = 0;
};

inline constexpr const char* kUnsignedPayload = "UNSIGNED-PAYLOAD";

// The query as it must stand in the URL: sorted, encoded, without '?'.
std::string canonical_query(const std::vector<std::pair<std::string, std::string>>& query);

// The headers to send, "name: value": host is left to the HTTP library; the signed extra headers are included.
std::vector<std::string> sign(const ToSign& request, const Credentials& credentials);

}  // namespace nixl::core::s3
