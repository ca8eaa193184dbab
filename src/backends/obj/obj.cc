#include "backends/obj/obj.h"

#include <algorithm>

#include "backends/obj/s3.h"
#include "backends/objects/object_backend.h"
#include "base/env.h"
#include "http/text.h"

namespace nixl::core {
namespace {

Result<s3::S3Config> read_target(const Parameters& params, const Params& all) {
  s3::S3Config config;
  config.bucket = params.text("bucket", "AWS_DEFAULT_BUCKET");
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

Result<std::unique_ptr<Backend>> open_obj(BackendConfig config) {
  const Parameters params("OBJ", config.params);
  NIXL_ASSIGN(const bool accelerated, params.flag("accelerated"));
  if (accelerated)
    return fail(Code::kUnsupported,
                "OBJ parameter accelerated=true needs the cuObject client library (libcuobjclient.so), "
                "which this build does not drive; leave it out for plain HTTP");
  if (const std::string type = params.text("type"); !type.empty())
    return fail(Code::kInvalidArgument,
                "OBJ parameter type is '%s': only meaningful with accelerated=true, leave it empty", type.c_str());
  NIXL_ASSIGN(s3::S3Config target, read_target(params, config.params));
  NIXL_ASSIGN(const std::int64_t fast_limit, params.number("crtMinLimit", 0, 0));
  NIXL_ASSIGN(const std::int64_t target_gbps, params.number("throughput_target_gbps", 0, 0));
  NIXL_ASSIGN(auto credentials, s3::CredentialSource::open(config.params));
  NIXL_ASSIGN(auto client, open_client(params));
  http::ObjectEngineConfig engine_config;
  // One connection to S3 carries about half a gigabit a second.
  if (target_gbps > 0)
    engine_config.max_calls = static_cast<unsigned>(std::clamp<std::int64_t>(2 * target_gbps, 16, 512));
  if (fast_limit > 0)  // the fast path here: several parts of one object at once
    engine_config.whole_bytes = std::max<std::uint64_t>(fast_limit - 1, 5 << 20);

  const std::string path = target.scheme + "+s3";
  auto protocol = std::make_unique<s3::S3>(std::move(target), std::move(credentials));
  NIXL_TRY(first_contact(*client, protocol->head_bucket(),
                         "OBJ cannot reach its server (parameters endpoint_override, scheme, ca_bundle)"));
  NIXL_ASSIGN(auto engine, http::ObjectEngine::open(std::move(client), std::move(protocol), engine_config));
  return std::make_unique<ObjectBackend>("OBJ", path, std::move(config), std::move(engine));
}

Probe probe_obj() {
  return {true, "", staged_memory_kinds() | KindSet{MemKind::kObject}};
}

}  // namespace

std::span<const BackendEntry> backends_of_obj() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "OBJ";
    for (const char* key : {"access_key", "bucket", "ca_bundle", "endpoint_override", "region", "secret_key",
                            "session_token", "throughput_target_gbps", "type"})
      entry.params[key] = "";
    for (const char* key : {"accelerated", "use_virtual_addressing"}) entry.params[key] = "false";
    for (const char* key : {"req_checksum", "resp_checksum"}) entry.params[key] = "supported";
    entry.params["crtMinLimit"] = "0";
    entry.params["num_threads"] = std::to_string(half_the_cores());
    entry.params["scheme"] = "https";
    entry.list_params = false;
    entry.kinds = {MemKind::kDram, MemKind::kVram, MemKind::kObject};
    entry.local = true;
    entry.threads_param = "num_threads";
    entry.probe = probe_obj;
    entry.open = open_obj;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
