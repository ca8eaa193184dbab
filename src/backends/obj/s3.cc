#include "backends/obj/s3.h"

#include <array>

#include "base/bytes.h"
#include "http/text.h"

namespace nixl::core::s3 {
namespace {

constexpr char kChecksumHeader[] = "x-amz-checksum-crc32c";

std::string checksum_of(const http::Body& body) {
  std::uint32_t crc = 0;
  for (const iovec& part : body) crc = crc32c({static_cast<const char*>(part.iov_base), part.iov_len}, crc);
  const char raw[4] = {static_cast<char>(crc >> 24), static_cast<char>(crc >> 16), static_cast<char>(crc >> 8),
                       static_cast<char>(crc)};
  return http::base64_encode({raw, 4});
}

}  // namespace

http::Call S3::signed_call(std::string method, const std::string& key, Pairs query, Pairs headers) const {
  ToSign request;
  request.method = std::move(method);
  request.host = config_.virtual_addressing ? config_.bucket + "." + config_.host : config_.host;
  request.path = (config_.virtual_addressing ? "/" : "/" + config_.bucket + (key.empty() ? "" : "/")) +
                 http::percent_encode(key, true);
  request.query = std::move(query);
  request.headers = std::move(headers);
  request.payload_hash = kUnsignedPayload;  // the checksum header and TLS guard the body
  request.region = config_.region;
  request.when = std::time(nullptr);
  http::Call call;
  call.method = request.method;
  call.url = config_.scheme + "://" + request.host + request.path;
  if (!request.query.empty()) call.url += "?" + canonical_query(request.query);
  call.headers = sign(request, credentials_->get());
  return call;
}

http::Call S3::get(const std::string& key, std::uint64_t offset, std::uint64_t bytes) const {
  Pairs headers = {{"range", "bytes=" + std::to_string(offset) + "-" + std::to_string(offset + bytes - 1)}};
  if (config_.check_checksums) headers.emplace_back("x-amz-checksum-mode", "ENABLED");
  return signed_call("GET", key, {}, std::move(headers));
}

http::Call S3::put(const std::string& key, const http::Body& body) const {
  Pairs headers;
  if (config_.send_checksums) headers.emplace_back(kChecksumHeader, checksum_of(body));
  http::Call call = signed_call("PUT", key, {}, std::move(headers));
  call.body = body;
  return call;
}

http::Call S3::head(const std::string& key) const {
  return signed_call("HEAD", key, {}, {});
}
http::Call S3::head_bucket() const {
  return signed_call("HEAD", "", {}, {});
}

std::optional<http::Call> S3::begin_upload(const std::string& key) const {
  Pairs headers;
  if (config_.send_checksums) headers.emplace_back("x-amz-checksum-algorithm", "CRC32C");
  return signed_call("POST", key, {{"uploads", ""}}, std::move(headers));
}

Result<std::string> S3::upload_id(const http::Reply& reply) const {
  std::string id = http::xml_element(reply.text, "UploadId");
  if (id.empty())
    return fail(Code::kIo, "the server began an upload in parts without an UploadId: %.200s", reply.text.c_str());
  return id;
}

http::Call S3::put_part(const std::string& key, const std::string& upload, unsigned number,
                        const http::Body& body) const {
  Pairs headers;
  if (config_.send_checksums) headers.emplace_back(kChecksumHeader, checksum_of(body));
  http::Call call =
      signed_call("PUT", key, {{"partNumber", std::to_string(number)}, {"uploadId", upload}}, std::move(headers));
  call.body = body;
  return call;
}

// What the list of parts in finish_upload needs of one.
std::string S3::part_id(unsigned number, const http::Reply& reply) const {
  std::string xml = "<Part><PartNumber>" + std::to_string(number) + "</PartNumber><ETag>" +
                    std::string(reply.header("etag")) + "</ETag>";
  if (const std::string_view sum = reply.header(kChecksumHeader); config_.send_checksums && !sum.empty())
    xml += "<ChecksumCRC32C>" + std::string(sum) + "</ChecksumCRC32C>";
  return xml + "</Part>";
}

http::Call S3::finish_upload(const std::string& key, const std::string& upload,
                             const std::vector<std::string>& parts) const {
  std::string xml = "<CompleteMultipartUpload xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">";
  for (const std::string& part : parts) xml += part;
  http::Call call = signed_call("POST", key, {{"uploadId", upload}}, {});
  call.headers.push_back("Content-Type: application/xml");
  call.text_body = xml + "</CompleteMultipartUpload>";
  return call;
}

std::optional<http::Call> S3::abort_upload(const std::string& key, const std::string& upload) const {
  return signed_call("DELETE", key, {{"uploadId", upload}}, {});
}

Result<void> S3::check(const http::Call& call, const http::Reply& reply) const {
  // A multipart upload may be answered 200 and fail all the same, told in the body.
  if (call.method == "POST" && reply.text.find("<Error>") != std::string::npos)
    return fail(Code::kIo, "%s", error_text(reply).c_str());
  if (call.method != "GET" || !config_.check_checksums) return {};
  const std::string_view expected = reply.header(kChecksumHeader);
  // Of a part of an object, or of one stored in parts ("sum-count"), the sum says nothing about these bytes alone.
  if (expected.empty() || expected.find('-') != std::string_view::npos) return {};
  const std::string range(reply.header("content-range"));  // "bytes 0-9/10"
  if (!range.empty()) {
    const std::size_t slash = range.find('/');
    const std::string whole = slash == std::string::npos ? ""
                                                         : "bytes 0-" + std::to_string(reply.received - 1) + "/" +
                                                               std::to_string(reply.received);
    if (range != whole) return {};
  }
  const std::string seen = checksum_of(call.sink);
  if (seen != expected)
    return fail(Code::kIo, "checksum mismatch: CRC-32C of the bytes received is %s, the server says %.*s", seen.c_str(),
                static_cast<int>(expected.size()), expected.data());
  return {};
}

std::string S3::error_text(const http::Reply& reply) const {
  const std::string code = http::xml_element(reply.text, "Code"), message = http::xml_element(reply.text, "Message");
  if (code.empty()) return reply.text.substr(0, 200);
  return code + (message.empty() ? "" : ": " + message);
}

bool S3::worth_repeating(const http::Reply& reply) const {
  const std::string code = http::xml_element(reply.text, "Code");
  for (const char* temporary : {"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable", "Throttling"})
    if (code == temporary) return true;
  return false;
}

}  // namespace nixl::core::s3
