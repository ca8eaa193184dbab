#include "backends/obj/sigv4.h"

#include <algorithm>

#include "base/sha256.h"
#include "http/text.h"

namespace nixl::core::s3 {

std::string canonical_query(const std::vector<std::pair<std::string, std::string>>& query) {
  std::vector<std::string> parts;
  for (const auto& [name, value] : query)
    parts.push_back(http::percent_encode(name, false) + "=" + http::percent_encode(value, false));
  std::sort(parts.begin(), parts.end());
  std::string out;
  for (const std::string& part : parts) out += (out.empty() ? "" : "&") + part;
  return out;
}

std::vector<std::string> sign(const ToSign& request, const Credentials& credentials) {
  std::tm tm;
  ::gmtime_r(&request.when, &tm);
  char stamp[32];
  std::strftime(stamp, sizeof stamp, "%Y%m%dT%H%M%SZ", &tm);
  const std::string time = stamp, day = time.substr(0, 8);

  auto headers = request.headers;
  headers.emplace_back("host", request.host);
  headers.emplace_back("x-amz-content-sha256", request.payload_hash);
  headers.emplace_back("x-amz-date", time);
  if (!credentials.session_token.empty()) headers.emplace_back("x-amz-security-token", credentials.session_token);
  std::sort(headers.begin(), headers.end());

  std::string canonical_headers, names;
  std::vector<std::string> out;
  for (const auto& [name, value] : headers) {
    canonical_headers += name + ":" + value + "\n";
    names += (names.empty() ? "" : ";") + name;
    if (name != "host") out.push_back(name + ": " + value);
  }
  const std::string canonical = request.method + "\n" + request.path + "\n" + canonical_query(request.query) + "\n" +
                                canonical_headers + "\n" + names + "\n" + request.payload_hash;
  const std::string scope = day + "/" + request.region + "/s3/aws4_request";
  const std::string text = "AWS4-HMAC-SHA256\n" + time + "\n" + scope + "\n" + http::hex(sha256(canonical));
  std::string key = hmac_sha256("AWS4" + credentials.secret_key, day);
  for (const std::string& part : {request.region, std::string("s3"), std::string("aws4_request")})
    key = hmac_sha256(key, part);
  out.push_back("Authorization: AWS4-HMAC-SHA256 Credential=" + credentials.access_key + "/" + scope +
                ",SignedHeaders=" + names + ",Signature=" + http::hex(hmac_sha256(key, text)));
  return out;
}

}  // namespace nixl::core::s3
