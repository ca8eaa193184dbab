// The requests of S3 (and of servers that speak it), for http/objects.h.
#pragma once
#include <memory>
#include <string>

#include "backends/obj/credentials.h"
#include "http/objects.h"

namespace nixl::core::s3 {

struct S3Config {
  std::string scheme = "https", host;  // host with port
  std::string bucket, region;
  bool virtual_addressing = false;  // bucket in the host name instead of the path
  bool send_checksums = true;       // CRC-32C of what is written
  bool check_checksums = true;      // of whole objects read, where the server has one
};

class S3 final : public http::Protocol {
 public:
  S3(S3Config config, std::unique_ptr<CredentialSource> credentials)
      : config_(std::move(config)), credentials_(std::move(credentials)) {}

  http::Call get(const std::string& key, std::uint64_t offset, std::uint64_t bytes) const override;
  http::Call put(const std::string& key, const http::Body& body) const override;
  http::Call head(const std::string& key) const override;
  http::Call head_bucket() const;
  std::optional<http::Call> begin_upload(const std::string& key) const override;
  Result<std::string> upload_id(const http::Reply& reply) const override;
  http::Call put_part(const std::string& key, const std::string& upload, unsigned number,
                      const http::Body& body) const override;
  std::string part_id(unsigned number, const http::Reply& reply) const override;
  http::Call finish_upload(const std::string& key, const std::string& upload,
                           const std::vector<std::string>& parts) const override;
  std::optional<http::Call> abort_upload(const std::string& key, const std::string& upload) const override;
  Result<void> check(const http::Call& call, const http::Reply& reply) const override;
  std::string error_text(const http::Reply& reply) const override;
  bool worth_repeating(const http::Reply& reply) const override;

 private:
  using Pairs = std::vector<std::pair<std::string, std::string>>;
  http::Call signed_call(std::string method, const std::string& key, Pairs query, Pairs headers) const;

  const S3Config config_;
  const std::unique_ptr<CredentialSource> credentials_;
};

}  // namespace nixl::core::s3
