// The requests of Azure Blob Storage, for http/objects.h, signed with the account's key or by a SAS in the query.
#pragma once
#include <ctime>
#include <string>

#include "contract/memory.h"
#include "http/objects.h"

namespace nixl::core::azure {

struct AzureConfig {
  std::string account_url;  // "https://ACCOUNT.blob.core.windows.net", no '/' at the end
  std::string container;
  std::string account, key;  // key: raw bytes; empty: unsigned, the SAS speaks
  std::string sas;           // query without '?'
};

// From parameters, else the environment. kIo: what is missing, with both names.
Result<AzureConfig> read_config(const Params& params);

// The value of the Authorization header of one request. `headers`: "Name: value"; `path`: as in the URL; `query`:
// encoded.
struct ToSign {
  std::string method, path, query;
  std::uint64_t content_length = 0;
  std::vector<std::string> headers;
};
std::string authorization(const ToSign& request, const std::string& account, const std::string& key);

class Azure final : public http::Protocol {
 public:
  explicit Azure(AzureConfig config) : config_(std::move(config)) {}
  http::Call get(const std::string& key, std::uint64_t offset, std::uint64_t bytes) const override;
  http::Call put(const std::string& key, const http::Body& body) const override;
  http::Call head(const std::string& key) const override;
  http::Call head_container() const;
  std::optional<http::Call> begin_upload(const std::string&) const override { return std::nullopt; }
  Result<std::string> upload_id(const http::Reply&) const override;  // a name for the blocks of one upload
  http::Call put_part(const std::string& key, const std::string& upload, unsigned number,
                      const http::Body& body) const override;
  std::string part_id(unsigned, const http::Reply&) const override { return {}; }
  http::Call finish_upload(const std::string& key, const std::string& upload,
                           const std::vector<std::string>& parts) const override;
  std::optional<http::Call> abort_upload(const std::string&, const std::string&) const override { return std::nullopt; }
  Result<void> check(const http::Call&, const http::Reply&) const override { return {}; }
  std::string error_text(const http::Reply& reply) const override;
  bool worth_repeating(const http::Reply& reply) const override;

 private:
  http::Call request(std::string method, const std::string& key, const std::string& query,
                     std::vector<std::string> headers, std::uint64_t content_length) const;
  const AzureConfig config_;
};

}  // namespace nixl::core::azure
