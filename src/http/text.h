// Texts that HTTP interfaces need: percent and base64 coding, dates, the little XML that object stores answer with.
#pragma once
#include <ctime>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace nixl::core::http {

// RFC 3986: everything but letters, digits, - . _ ~ becomes %XX; '/' stays if `keep_slash`.
std::string percent_encode(std::string_view text, bool keep_slash);
std::string base64_encode(std::string_view bytes);
Result<std::string> base64_decode(std::string_view text);
std::string hex(std::string_view bytes);  // lower case
std::string http_date(std::time_t when);  // "Sun, 06 Nov 1994 08:49:37 GMT"

// Text of the first element <name>...</name>, entities resolved; empty if absent.
std::string xml_element(std::string_view xml, std::string_view name);

// Parts of "scheme://host[:port]/path?query".
struct Url {
  std::string scheme, host, path, query;  // host with its port
};
Result<Url> parse_url(std::string_view text);

}  // namespace nixl::core::http
