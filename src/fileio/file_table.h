// FileTable: the files registered with one backend, by the rules of FILE descriptors: an id names a descriptor lent by
// the caller, or, with a path-mode text, a file that is opened here and closed with its last registration.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string_view>

#include "fileio/file.h"

namespace nixl::core::fileio {

class FileTable {
 public:
  // Any thread. Path mode: an id in use by another path-mode registration is refused. Lent: registrations of one open
  // descriptor share a File.
  Result<std::shared_ptr<File>> add(std::uint64_t id, std::string_view text);

 private:
  std::mutex mutex_;
  std::map<std::uint64_t, std::weak_ptr<File>> opened_, lent_;
};

}  // namespace nixl::core::fileio
