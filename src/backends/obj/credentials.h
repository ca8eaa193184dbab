// Where the keys come from: parameters, else the environment, else the profile files, else the machine's metadata
// service. None of the values is ever logged.
#pragma once
#include <ctime>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "backends/obj/sigv4.h"
#include "base/result.h"
#include "contract/memory.h"

namespace nixl::core::s3 {

// One section of an AWS profile file: name -> value. Empty if the file or the section is missing.
std::map<std::string, std::string> profile_section(const std::string& path, const std::string& profile);

std::string find_region(const Params& params);  // "us-east-1" if nobody says

// The keys, and until when they are valid (metadata service), asked for again when they are about to end.
class CredentialSource {
 public:
  // kNotFound: no credentials; the reason lists where they were looked for.
  static Result<std::unique_ptr<CredentialSource>> open(const Params& params);
  // Any thread. May ask the metadata service, for at most two seconds, when the old keys are about to end.
  Credentials get();

 private:
  Result<void> ask_metadata_service();
  std::mutex mutex_;
  Credentials current_;
  std::time_t ends_ = 0;  // 0: never
};

}  // namespace nixl::core::s3
