#include "backends/obj/obj.h"

#include <unistd.h>

#include <algorithm>

#include "backends/obj/s3.h"
#include "backends/objects/object_backend.h"
#include "base/env.h"
#include "base/log.h"
#include "http/text.h"

namespace nixl::core {
namespace {

constexpr Nanoseconds kFirstContact = 2'000'000'000;

class Reader {
 public:
  explicit Reader(const Params& params) : params_(params) {}
  std::string text(const char* key) const {
    const auto found = params_.find(key);
    return found == params_.end() ? std::string() : found->second;
  }
  Result<bool> flag(const char* key) const {
    const std::string value = text(key);
    if (value.empty()) return false;
    const auto parsed = parse_bool(value);
    if (!parsed)
      return fail(Code::kInvalidArgument, "OBJ parameter %s is '%s': true or false is needed", key, value.c_str());
    return *parsed;
  }
  Result<std::int64_t> number(const char* key, std::int64_t fallback) const {
    const std::string value = text(key);
    if (value.empty()) return fallback;
    const auto parsed = parse_int(value);
    if (!parsed || *parsed < 0)
      return fail(Code::kInvalidArgument, "OBJ parameter %s is '%s': a number >= 0 is needed", key, value.c_str());
    return *parsed;
  }
  // One of two words; the first is what an empty value means.
  Result<std::string> choice(const char* key, const char* first, const char* second) const {
    const std::string value = text(key);
    if (value.empty() || value == first) return std::string(first);
    if (value == second) return std::string(second);
    return fail(Code::kInvalidArgument, "OBJ parameter %s is '%s': %s or %s is needed", key, value.c_str(), first,
                second);
  }

 private:
  const Params& params_;
};

Result<s3::S3Config> read_target(const Reader& params, const Params& all) {
  s3::S3Config config;
  config.bucket = params.text("bucket");
  if (config.bucket.empty()) config.bucket = env_text("AWS_DEFAULT_BUCKET").value_or("");
  if (config.bucket.empty())
    return fail(
        Code::kIo,
        "OBJ needs a bucket: neither the parameter bucket nor the environment variable AWS_DEFAULT_BUCKET is set");
  config.region = s3::find_region(all);
  NIXL_ASSIGN(config.scheme, params.choice("scheme", "https", "http"));
  NIXL_ASSIGN(config.virtual_addressing, params.flag("use_virtual_addressing"));
  NIXL_ASSIGN(const std::string request_sums, params.choice("req_checksum", "supported", "required"));
  NIXL_ASSIGN(const std::string reply_sums, params.choice("resp_checksum", "supported", "required"));
  config.send_checksums = request_sums == "supported";
  config.check_checksums = reply_sums == "supported";
  std::string endpoint = params.text("endpoint_override");
  for (const char* name : {"AWS_ENDPOINT_OVERRIDE", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"})
    if (endpoint.empty()) endpoint = env_text(name).value_or("");
  if (endpoint.empty()) {
    config.host = "s3." + config.region + ".amazonaws.com";
    return config;
  }
  if (endpoint.find("://") == std::string::npos) endpoint = config.scheme + "://" + endpoint;
  auto url = http::parse_url(endpoint);
  if (!url) return fail(within("OBJ parameter endpoint_override", std::move(url).error()));
  config.scheme = url->scheme;
  config.host = url->host;
  return config;
}

// A server that refuses at once is told now, not at the first transfer. What it answers does not matter: the rights to
// look at the bucket may be missing where those to use its objects are given.
Result<void> first_contact(http::Client& client, const s3::S3& protocol) {
  http::Call call = protocol.head_bucket();
  call.deadline = Deadline::after(kFirstContact);
  const http::Outcome outcome = client.perform(std::move(call));
  if (!outcome.failed || outcome.error.code == Code::kTimeout) return {};
  return fail(within("OBJ cannot reach its server (parameters endpoint_override, scheme, ca_bundle)", outcome.error));
}

Result<std::unique_ptr<Backend>> open_obj(BackendConfig config) {
  const Reader params(config.params);
  NIXL_ASSIGN(const bool accelerated, params.flag("accelerated"));
  if (accelerated)
    return fail(Code::kUnsupported,
                "OBJ parameter accelerated=true needs the cuObject client library (libcuobjclient.so), "
                "which this build does not drive; leave it out for plain HTTP");
  if (const std::string type = params.text("type"); !type.empty())
    return fail(Code::kInvalidArgument,
                "OBJ parameter type is '%s': only meaningful with accelerated=true, leave it empty", type.c_str());
  NIXL_ASSIGN(s3::S3Config target, read_target(params, config.params));
  NIXL_ASSIGN(const std::int64_t threads,
              params.number("num_threads", std::max(1l, ::sysconf(_SC_NPROCESSORS_ONLN) / 2)));
  NIXL_ASSIGN(const std::int64_t fast_limit, params.number("crtMinLimit", 0));
  NIXL_ASSIGN(const std::int64_t target_gbps, params.number("throughput_target_gbps", 0));
  NIXL_ASSIGN(auto credentials, s3::CredentialSource::open(config.params));

  http::ClientConfig client_config;
  client_config.num_threads = static_cast<unsigned>(std::clamp<std::int64_t>(threads, 1, 64));
  client_config.ca_bundle = params.text("ca_bundle");
  if (!client_config.ca_bundle.empty() && ::access(client_config.ca_bundle.c_str(), R_OK) != 0)
    return fail(errno_error("OBJ parameter ca_bundle: " + client_config.ca_bundle, errno));
  http::ObjectEngineConfig engine_config;
  // One connection to S3 carries about half a gigabit a second.
  if (target_gbps > 0)
    engine_config.max_calls = static_cast<unsigned>(std::clamp<std::int64_t>(2 * target_gbps, 16, 512));
  if (fast_limit > 0)  // the fast path here: several parts of one object at once
    engine_config.whole_bytes = std::max<std::uint64_t>(fast_limit - 1, 5 << 20);
  NIXL_ASSIGN(auto client, http::Client::open(client_config));

  const std::string path = target.scheme + "+s3";
  auto protocol = std::make_unique<s3::S3>(std::move(target), std::move(credentials));
  NIXL_TRY(first_contact(*client, *protocol));
  NIXL_ASSIGN(auto engine, http::ObjectEngine::open(std::move(client), std::move(protocol), engine_config));
  return std::make_unique<ObjectBackend>("OBJ", path, std::move(config), std::move(engine));
}

Probe probe_obj() {
  return {true, "", {MemKind::kDram, MemKind::kObject}};
}

}  // namespace

std::span<const BackendEntry> backends_of_obj() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "OBJ";
    for (const char* key : {"access_key", "accelerated", "bucket", "ca_bundle", "crtMinLimit", "endpoint_override",
                            "num_threads", "region", "req_checksum", "resp_checksum", "scheme", "secret_key",
                            "session_token", "throughput_target_gbps", "type", "use_virtual_addressing"})
      entry.params[key] = "";
    entry.list_params = false;
    entry.kinds = {MemKind::kDram, MemKind::kObject};
    entry.local = true;
    entry.threads_param = "num_threads";
    entry.probe = probe_obj;
    entry.open = open_obj;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
