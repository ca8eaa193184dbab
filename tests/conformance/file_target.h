// A file on a file system as what a conformance suite writes to and reads from.
#pragma once
#include <stdlib.h>
#include <unistd.h>

#include <fstream>
#include <sstream>
#include <string>
#include <utility>

#include "conformance/backend_suite.h"

namespace nixl::core::conformance {

class FileTarget final : public Target {
 public:
  // A new file in `folder`, removed with this; `flags` precede its path in the region.
  FileTarget(const std::string& folder, std::size_t bytes, std::string flags) : flags_(std::move(flags)) {
    path_ = folder + "/nixl_suite_XXXXXX";
    ::close(::mkstemp(path_.data()));
    (void)!::truncate(path_.c_str(), static_cast<off_t>(bytes));
  }
  ~FileTarget() override { ::unlink(path_.c_str()); }
  Region region() const override { return {MemKind::kFile, 0, 0, 1, flags_ + path_}; }
  std::string contents() override {
    std::ostringstream bytes;
    bytes << std::ifstream(path_, std::ios::binary).rdbuf();
    return bytes.str();
  }
  void set_contents(const std::string& bytes) override { std::ofstream(path_, std::ios::binary) << bytes; }

 private:
  std::string flags_, path_;
};

}  // namespace nixl::core::conformance
