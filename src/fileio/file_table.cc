#include "fileio/file_table.h"

#include <climits>

namespace nixl::core::fileio {

Result<std::shared_ptr<File>> FileTable::add(std::uint64_t id, std::string_view text) {
  NIXL_ASSIGN(const auto mode, parse_path_mode(text));
  const std::lock_guard lock(mutex_);
  if (mode) {
    const auto used = opened_.find(id);
    if (used != opened_.end() && !used->second.expired())
      return fail(Code::kInvalidArgument,
                  "file id %llu is in use for %s: every path-mode registration needs its own id",
                  static_cast<unsigned long long>(id), used->second.lock()->name().c_str());
    NIXL_ASSIGN(std::shared_ptr<File> file, File::open(*mode));
    opened_[id] = file;
    return file;
  }
  if (id > INT_MAX)
    return fail(Code::kInvalidArgument,
                "file id %llu is no file descriptor; to have the file opened, register it with the text "
                "\"rw:<path>\" or \"ro:<path>\"",
                static_cast<unsigned long long>(id));
  if (const auto known = lent_[id].lock(); known && known->check_lent()) return known;
  NIXL_ASSIGN(std::shared_ptr<File> file, File::borrow(static_cast<int>(id), text));
  lent_[id] = file;
  return file;
}

}  // namespace nixl::core::fileio
