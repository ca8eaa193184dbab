#include "backends/obj/credentials.h"

#include <fstream>
#include <mutex>

#include "base/env.h"
#include "base/log.h"
#include "http/client.h"
#include "http/json.h"

namespace nixl::core::s3 {
namespace {

constexpr Nanoseconds kMetadataPatience = 1'000'000'000;  // of each of its requests
constexpr std::time_t kRenewBefore = 300;                 // seconds before the keys end

std::string param(const Params& params, const char* key) {
  const auto found = params.find(key);
  return found == params.end() ? std::string() : found->second;
}
std::string env(const char* name) {
  return env_text(name).value_or("");
}

std::string trimmed(std::string text) {
  const auto blank = [](char c) { return c == ' ' || c == '\t' || c == '\r'; };
  while (!text.empty() && blank(text.back())) text.pop_back();
  while (!text.empty() && blank(text.front())) text.erase(0, 1);
  return text;
}
std::string profile_name() {
  const std::string name = env("AWS_PROFILE");
  return name.empty() ? "default" : name;
}
std::string home_file(const char* variable, const char* name) {
  const std::string given = env(variable);
  return given.empty() ? env("HOME") + "/.aws/" + name : given;
}
std::map<std::string, std::string> config_section() {
  const std::string name = profile_name();
  return profile_section(home_file("AWS_CONFIG_FILE", "config"), name == "default" ? name : "profile " + name);
}

}  // namespace

std::map<std::string, std::string> profile_section(const std::string& path, const std::string& profile) {
  std::map<std::string, std::string> values;
  std::ifstream file(path);
  bool inside = false;
  for (std::string line; std::getline(file, line);) {
    line = trimmed(line);
    if (line.empty() || line[0] == '#' || line[0] == ';') continue;
    if (line[0] == '[') {
      inside = line.size() > 2 && trimmed(line.substr(1, line.find(']') - 1)) == profile;
    } else if (const std::size_t equals = line.find('='); inside && equals != std::string::npos) {
      values[trimmed(line.substr(0, equals))] = trimmed(line.substr(equals + 1));
    }
  }
  return values;
}

std::string find_region(const Params& params) {
  for (const std::string& region :
       {param(params, "region"), env("AWS_REGION"), env("AWS_DEFAULT_REGION"), config_section()["region"]})
    if (!region.empty()) return region;
  return "us-east-1";
}

Result<std::unique_ptr<CredentialSource>> CredentialSource::open(const Params& params) {
  auto source = std::make_unique<CredentialSource>();
  const auto complete = [&](std::string access, std::string secret, std::string token) {
    source->current_ = {std::move(access), std::move(secret), std::move(token)};
    return !source->current_.access_key.empty() && !source->current_.secret_key.empty();
  };
  const std::string access = param(params, "access_key"), secret = param(params, "secret_key");
  if (access.empty() != secret.empty())
    return fail(Code::kInvalidArgument, "OBJ parameter %s is set without %s: both or neither",
                access.empty() ? "secret_key" : "access_key", access.empty() ? "access_key" : "secret_key");
  if (complete(access, secret, param(params, "session_token"))) return source;
  if (complete(env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY"), env("AWS_SESSION_TOKEN"))) return source;
  const std::string file = home_file("AWS_SHARED_CREDENTIALS_FILE", "credentials");
  auto section = profile_section(file, profile_name());
  if (section.empty()) section = config_section();
  if (complete(section["aws_access_key_id"], section["aws_secret_access_key"], section["aws_session_token"]))
    return source;
  auto asked = source->ask_metadata_service();
  if (asked) return source;
  return fail(Code::kNotFound,
              "OBJ has no credentials: parameters access_key and secret_key are not set, nor AWS_ACCESS_KEY_ID and "
              "AWS_SECRET_ACCESS_KEY; profile \"%s\" of %s has none; the metadata service: %s",
              profile_name().c_str(), file.c_str(), asked.error().reason.c_str());
}

Credentials CredentialSource::get() {
  const std::lock_guard lock(mutex_);
  if (ends_ != 0 && std::time(nullptr) > ends_ - kRenewBefore)
    if (const auto asked = ask_metadata_service(); !asked)
      NIXL_WARN("OBJ credentials end soon and could not be renewed: %s", asked.error().reason.c_str());
  return current_;
}

Result<void> CredentialSource::ask_metadata_service() {
  if (parse_bool(env("AWS_EC2_METADATA_DISABLED")).value_or(false))
    return fail(Code::kNotFound, "switched off by AWS_EC2_METADATA_DISABLED");
  const std::string given = env("AWS_EC2_METADATA_SERVICE_ENDPOINT");
  const std::string base = (given.empty() ? "http://169.254.169.254" : given) + "/latest/";
  http::ClientConfig config;
  config.connect_timeout_ns = kMetadataPatience;
  NIXL_ASSIGN(const auto client, http::Client::open(config));
  const auto ask = [&](const char* method, const std::string& path, std::string header) -> Result<std::string> {
    http::Call call;
    call.method = method;
    call.url = base + path;
    call.headers = {std::move(header)};
    call.deadline = Deadline::after(kMetadataPatience);
    http::Outcome outcome = client->perform(std::move(call));
    if (outcome.failed) return fail(std::move(outcome.error));
    if (!outcome.reply.ok())
      return fail(Code::kNotFound, "%s answered %d", (base + path).c_str(), outcome.reply.status);
    return std::move(outcome.reply.text);
  };
  NIXL_ASSIGN(const std::string token, ask("PUT", "api/token", "X-aws-ec2-metadata-token-ttl-seconds: 21600"));
  const std::string header = "X-aws-ec2-metadata-token: " + token;
  const std::string folder = "meta-data/iam/security-credentials/";
  NIXL_ASSIGN(const std::string roles, ask("GET", folder, header));
  NIXL_ASSIGN(const std::string text, ask("GET", folder + trimmed(roles.substr(0, roles.find('\n'))), header));
  NIXL_ASSIGN(const http::Json answer, http::Json::parse(text));
  current_ = {answer["AccessKeyId"].text(), answer["SecretAccessKey"].text(), answer["Token"].text()};
  std::tm tm = {};
  ends_ = ::strptime(answer["Expiration"].text().c_str(), "%Y-%m-%dT%H:%M:%SZ", &tm) ? ::timegm(&tm) : 0;
  if (current_.access_key.empty()) return fail(Code::kNotFound, "%s%s gave no keys", base.c_str(), folder.c_str());
  return {};
}

}  // namespace nixl::core::s3
