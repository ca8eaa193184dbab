// File: one open file that transfers read and write. Two ways in: a path with flags (we open and close it), or a
// descriptor lent by the caller, of which a duplicate is kept, so that a descriptor number reused by the program can
// never send bytes to another file.
//
// Direct I/O wants aligned offsets and memory. `plan` of transfer.h splits what is not aligned; for the odd ends a File
// opens, at the first need, a second descriptor of the same file without O_DIRECT.
#pragma once
#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

#include "base/fd.h"
#include "base/result.h"

namespace nixl::core::fileio {

// The text form "<ro|rw>[,direct][,sync][,noatime][,create]:<path>".
struct PathMode {
  int flags = 0;  // of open(2)
  std::string path;
};

// nullopt: the text is no path mode at all (a plain path, a key, empty), so the descriptor number counts.
// Error (invalid argument): it starts like one (`ro:`, `rw,` ...) but has an unknown flag or no path.
Result<std::optional<PathMode>> parse_path_mode(std::string_view text);

class File {
 public:
  static Result<std::unique_ptr<File>> open(const PathMode& mode);
  // `fd` stays the caller's; `label` is a name for messages and may be empty.
  static Result<std::unique_ptr<File>> borrow(int fd, std::string_view label);

  int fd() const noexcept { return fd_.get(); }
  bool direct() const noexcept { return direct_; }
  bool readable() const noexcept { return readable_; }
  bool writable() const noexcept { return writable_; }
  bool waits_for_device() const noexcept {
    return waits_;
  }  // O_SYNC, O_DSYNC: a write returns when it is on the device
  // Direct I/O only: what offsets and lengths, and what memory addresses, must be multiples of. Powers of two.
  std::uint32_t offset_align() const noexcept { return offset_align_; }
  std::uint32_t memory_align() const noexcept { return memory_align_; }

  // The same file through the page cache (the file itself unless it is direct). Thread-safe; opened once.
  Result<int> buffered_fd() const;

  // A lent descriptor must still be the file that was registered: EBADF if its owner closed it or reused the number.
  Result<void> check_lent() const;

  // "/a/b (fd 7)": for messages.
  const std::string& name() const noexcept { return name_; }

 private:
  File() = default;
  Result<void> inspect();

  Fd fd_;
  int lent_fd_ = -1;
  dev_t device_ = 0;
  ino_t inode_ = 0;
  bool direct_ = false, readable_ = false, writable_ = false, waits_ = false;
  std::uint32_t offset_align_ = 1, memory_align_ = 1;
  std::string name_;
  mutable std::mutex twin_mutex_;
  mutable Fd twin_;
};

struct FileInfo {
  std::uint64_t size = 0;
  std::uint32_t mode = 0;
  std::int64_t mtime = 0;  // seconds
};
// nullopt: no such file. Any other failure is an error with its errno.
Result<std::optional<FileInfo>> file_info(const std::string& path);

}  // namespace nixl::core::fileio
