#include "backends/azure_blob/azure.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <map>
#include <random>

#include "base/env.h"
#include "base/sha256.h"
#include "http/text.h"

namespace nixl::core::azure {
namespace {

constexpr char kVersion[] = "2021-08-06";

std::uint64_t size_of(const http::Body& body) {
  std::uint64_t sum = 0;
  for (const iovec& part : body) sum += part.iov_len;
  return sum;
}
std::string lower(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}
std::string block_id(const std::string& upload, unsigned number) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "%06u", number);
  return http::base64_encode(upload + digits);
}
std::string unescape(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size(); ++i) {
    unsigned value = 0;
    const char* const digits = text.data() + i + 1;
    if (text[i] == '%' && i + 2 < text.size() && std::from_chars(digits, digits + 2, value, 16).ptr == digits + 2) {
      out += static_cast<char>(value);
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

std::string value_of(const Params& params, const char* key, const char* variable) {
  const auto found = params.find(key);
  if (found != params.end() && !found->second.empty()) return found->second;
  return env_text(variable).value_or("");
}

// "Name=value;Name=value": values may hold '='.
std::map<std::string, std::string> parse_connection_string(std::string_view text) {
  std::map<std::string, std::string> fields;
  while (!text.empty()) {
    const std::string_view field = text.substr(0, text.find(';'));
    text.remove_prefix(std::min(text.size(), field.size() + 1));
    if (const std::size_t equals = field.find('='); equals != std::string_view::npos)
      fields[std::string(field.substr(0, equals))] = field.substr(equals + 1);
  }
  return fields;
}

}  // namespace

Result<AzureConfig> read_config(const Params& params) {
  AzureConfig config;
  config.container = value_of(params, "container_name", "AZURE_STORAGE_CONTAINER_NAME");
  if (config.container.empty())
    return fail(
        Code::kIo,
        "AZURE_BLOB needs a container: neither the parameter container_name nor AZURE_STORAGE_CONTAINER_NAME is set");
  std::string url = value_of(params, "account_url", "AZURE_STORAGE_ACCOUNT_URL");
  auto fields = parse_connection_string(value_of(params, "connection_string", "AZURE_STORAGE_CONNECTION_STRING"));
  config.account = fields["AccountName"];
  config.sas = fields["SharedAccessSignature"];
  if (const std::string& key = fields["AccountKey"]; !key.empty()) {
    auto raw = http::base64_decode(key);
    if (!raw) return fail(Code::kInvalidArgument, "AZURE_BLOB parameter connection_string: AccountKey is not base64");
    config.key = std::move(*raw);
  }
  if (url.empty()) url = fields["BlobEndpoint"];
  if (url.empty() && !config.account.empty()) {
    const std::string suffix = fields["EndpointSuffix"].empty() ? "core.windows.net" : fields["EndpointSuffix"];
    const std::string scheme =
        fields["DefaultEndpointsProtocol"].empty() ? "https" : fields["DefaultEndpointsProtocol"];
    url = scheme + "://" + config.account + ".blob." + suffix;
  }
  if (url.empty())
    return fail(Code::kIo,
                "AZURE_BLOB needs an account: none of account_url, connection_string, AZURE_STORAGE_ACCOUNT_URL, "
                "AZURE_STORAGE_CONNECTION_STRING is set");
  if (const std::size_t question = url.find('?'); question != std::string::npos) {
    config.sas = url.substr(question + 1);
    url.resize(question);
  }
  while (!url.empty() && url.back() == '/') url.pop_back();
  if (const auto parsed = http::parse_url(url); !parsed)
    return fail(within("AZURE_BLOB parameter account_url", parsed.error()));
  config.account_url = url;
  if (config.key.empty() && config.sas.empty())
    return fail(Code::kIo,
                "AZURE_BLOB has no credentials: put AccountName and AccountKey into connection_string, or a SAS behind "
                "'?' of account_url; managed identities are not supported");
  return config;
}

std::string authorization(const ToSign& request, const std::string& account, const std::string& key) {
  std::map<std::string, std::string> headers;
  for (const std::string& header : request.headers) {
    const std::size_t colon = header.find(':');
    headers[lower(header.substr(0, colon))] = header.substr(colon + 2);
  }
  std::string text =
      request.method + "\n\n\n" + (request.content_length ? std::to_string(request.content_length) : "") + "\n\n";
  text += headers["content-type"] + "\n\n\n\n\n\n" + headers["range"] + "\n";
  for (const auto& [name, value] : headers)
    if (name.substr(0, 5) == "x-ms-") text += name + ":" + value + "\n";
  text += "/" + account + request.path;
  std::map<std::string, std::string> query;
  for (std::string_view rest = request.query; !rest.empty();) {
    const std::string_view pair = rest.substr(0, rest.find('&'));
    rest.remove_prefix(std::min(rest.size(), pair.size() + 1));
    const std::size_t equals = std::min(pair.find('='), pair.size());
    query[lower(std::string(pair.substr(0, equals)))] = unescape(pair.substr(std::min(pair.size(), equals + 1)));
  }
  for (const auto& [name, value] : query) text += "\n" + name + ":" + value;
  return "SharedKey " + account + ":" + http::base64_encode(hmac_sha256(key, text));
}

http::Call Azure::request(std::string method, const std::string& key, const std::string& query,
                          std::vector<std::string> headers, std::uint64_t content_length) const {
  http::Call call;
  call.method = std::move(method);
  const std::string path = "/" + config_.container + (key.empty() ? "" : "/" + http::percent_encode(key, true));
  std::string full_query = query;
  if (!config_.sas.empty()) full_query += (query.empty() ? "" : "&") + config_.sas;
  call.url = config_.account_url + path + (full_query.empty() ? "" : "?" + full_query);
  call.headers = std::move(headers);
  call.headers.push_back(std::string("x-ms-version: ") + kVersion);
  call.headers.push_back("x-ms-date: " + http::http_date(std::time(nullptr)));
  if (!config_.key.empty() && config_.sas.empty()) {
    const auto url = http::parse_url(config_.account_url);  // checked when it was read
    const ToSign to_sign = {call.method, url->path + path, query, content_length, call.headers};
    call.headers.push_back("Authorization: " + authorization(to_sign, config_.account, config_.key));
  }
  return call;
}

http::Call Azure::get(const std::string& key, std::uint64_t offset, std::uint64_t bytes) const {
  return request("GET", key, "",
                 {"x-ms-range: bytes=" + std::to_string(offset) + "-" + std::to_string(offset + bytes - 1)}, 0);
}
http::Call Azure::put(const std::string& key, const http::Body& body) const {
  http::Call call = request("PUT", key, "", {"x-ms-blob-type: BlockBlob"}, size_of(body));
  call.body = body;
  return call;
}
http::Call Azure::head(const std::string& key) const {
  return request("HEAD", key, "", {}, 0);
}
http::Call Azure::head_container() const {
  return request("HEAD", "", "restype=container", {}, 0);
}

Result<std::string> Azure::upload_id(const http::Reply&) const {
  static std::atomic<std::uint64_t> count{std::random_device{}() * 0x100000001ull};
  char text[24];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(++count));
  return std::string(text);
}
http::Call Azure::put_part(const std::string& key, const std::string& upload, unsigned number,
                           const http::Body& body) const {
  http::Call call = request("PUT", key, "comp=block&blockid=" + http::percent_encode(block_id(upload, number), false),
                            {}, size_of(body));
  call.body = body;
  return call;
}
http::Call Azure::finish_upload(const std::string& key, const std::string& upload,
                                const std::vector<std::string>& parts) const {
  std::string xml = "<?xml version=\"1.0\" encoding=\"utf-8\"?><BlockList>";
  for (unsigned number = 1; number <= parts.size(); ++number)
    xml += "<Latest>" + block_id(upload, number) + "</Latest>";
  xml += "</BlockList>";
  http::Call call = request("PUT", key, "comp=blocklist", {"Content-Type: application/xml"}, xml.size());
  call.text_body = std::move(xml);
  return call;
}

std::string Azure::error_text(const http::Reply& reply) const {
  const std::string code(reply.header("x-ms-error-code")), message = http::xml_element(reply.text, "Message");
  if (code.empty()) return reply.text.substr(0, 200);
  return code + (message.empty() ? "" : ": " + message.substr(0, message.find('\n')));
}
bool Azure::worth_repeating(const http::Reply& reply) const {
  const std::string_view code = reply.header("x-ms-error-code");
  return code == "ServerBusy" || code == "OperationTimedOut" || code == "InternalError";
}

}  // namespace nixl::core::azure
