#include "fileio/file.h"

#include <fcntl.h>
#include <linux/stat.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <memory>

#ifndef STATX_DIOALIGN
#define STATX_DIOALIGN 0x00002000U
#endif

namespace nixl::core::fileio {
namespace {

constexpr std::uint32_t kSafeAlign = 4096;  // enough for every device we know; used where the kernel does not say

struct FlagWord {
  std::string_view word;
  int flag;
};
constexpr FlagWord kFlagWords[] = {{"direct", O_DIRECT}, {"sync", O_SYNC}, {"noatime", O_NOATIME}, {"create", O_CREAT}};

bool looks_like_path_mode(std::string_view text) {
  return text.size() >= 3 && (text.substr(0, 2) == "ro" || text.substr(0, 2) == "rw") &&
         (text[2] == ':' || text[2] == ',');
}

// Offsets 152 and 156 of struct statx hold the two alignments (kernel 6.1); the C library's struct may be older.
bool ask_direct_alignment(int fd, std::uint32_t* memory, std::uint32_t* offset) {
  alignas(8) unsigned char raw[256] = {};
  if (::syscall(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, raw) != 0) return false;
  std::uint32_t mask;
  __builtin_memcpy(&mask, raw, 4);
  __builtin_memcpy(memory, raw + 152, 4);
  __builtin_memcpy(offset, raw + 156, 4);
  const auto power = [](std::uint32_t x) { return x != 0 && (x & (x - 1)) == 0; };
  return (mask & STATX_DIOALIGN) && power(*memory) && power(*offset);
}

}  // namespace

Result<std::optional<PathMode>> parse_path_mode(std::string_view text) {
  if (!looks_like_path_mode(text)) return std::optional<PathMode>{};
  PathMode mode;
  mode.flags = O_CLOEXEC | (text[1] == 'o' ? O_RDONLY : O_RDWR);
  const std::size_t colon = text.find(':');
  if (colon == std::string_view::npos)
    return fail(Code::kInvalidArgument, "file text \"%.*s\" starts like a path mode but has no \":<path>\"",
                static_cast<int>(text.size()), text.data());
  std::string_view words = text.substr(2, colon - 2);
  while (!words.empty()) {
    words.remove_prefix(1);  // the comma
    const std::string_view word = words.substr(0, words.find(','));
    words.remove_prefix(word.size());
    const FlagWord* found = nullptr;
    for (const FlagWord& known : kFlagWords)
      if (known.word == word) found = &known;
    if (!found)
      return fail(Code::kInvalidArgument,
                  "file text \"%.*s\": unknown flag \"%.*s\"; known are direct, sync, noatime, create",
                  static_cast<int>(text.size()), text.data(), static_cast<int>(word.size()), word.data());
    mode.flags |= found->flag;
  }
  mode.path = text.substr(colon + 1);
  if (mode.path.empty())
    return fail(Code::kInvalidArgument, "file text \"%.*s\" has an empty path", static_cast<int>(text.size()),
                text.data());
  return std::optional<PathMode>(std::move(mode));
}

Result<std::unique_ptr<File>> File::open(const PathMode& mode) {
  std::unique_ptr<File> file(new File);
  file->fd_.reset(::open(mode.path.c_str(), mode.flags | O_CLOEXEC, 0644));
  if (!file->fd_) return fail(errno_error("open " + mode.path, errno));
  file->name_ = mode.path;
  NIXL_TRY(file->inspect());
  return file;
}

Result<std::unique_ptr<File>> File::borrow(int fd, std::string_view label) {
  std::unique_ptr<File> file(new File);
  file->fd_.reset(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!file->fd_)
    return fail(errno_error("file descriptor " + std::to_string(fd) + " is not open", errno, Code::kInvalidArgument));
  file->lent_fd_ = fd;
  if (!label.empty()) {
    file->name_ = label;
  } else {
    char path[4096];
    const ssize_t size = ::readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), path, sizeof path);
    if (size > 0) file->name_.assign(path, static_cast<std::size_t>(size));
  }
  file->name_ += " (fd " + std::to_string(fd) + ")";
  NIXL_TRY(file->inspect());
  return file;
}

Result<void> File::inspect() {
  const int flags = ::fcntl(fd(), F_GETFL);
  if (flags < 0) return fail(errno_error("flags of " + name_, errno));
  if (flags & O_PATH) return fail(Code::kInvalidArgument, "%s was opened with O_PATH: no data can pass", name_.c_str());
  struct stat status;
  if (::fstat(fd(), &status) != 0) return fail(errno_error("stat of " + name_, errno));
  if (S_ISDIR(status.st_mode)) return fail(errno_error(name_, EISDIR, Code::kInvalidArgument));
  device_ = status.st_dev;
  inode_ = status.st_ino;
  const int access = flags & O_ACCMODE;
  readable_ = access != O_WRONLY;
  writable_ = access != O_RDONLY;
  waits_ = flags & (O_SYNC | O_DSYNC);
  direct_ = flags & O_DIRECT;
  if (direct_ && !ask_direct_alignment(fd(), &memory_align_, &offset_align_))
    memory_align_ = offset_align_ = kSafeAlign;
  return {};
}

Result<int> File::buffered_fd() const {
  if (!direct_) return fd();
  std::lock_guard lock(twin_mutex_);
  if (!twin_) {
    const int flags = ::fcntl(fd(), F_GETFL) & (O_ACCMODE | O_SYNC | O_DSYNC | O_NOATIME);
    twin_.reset(::open(("/proc/self/fd/" + std::to_string(fd())).c_str(), flags | O_CLOEXEC));
    if (!twin_)
      return fail(errno_error("open " + name_ + " a second time, without O_DIRECT, for an unaligned end", errno));
  }
  return twin_.get();
}

Result<void> File::check_lent() const {
  if (lent_fd_ < 0) return {};
  struct stat status;
  if (::fstat(lent_fd_, &status) != 0) return fail(errno_error(name_ + " was closed after it was registered", errno));
  if (status.st_dev != device_ || status.st_ino != inode_)
    return fail(
        errno_error(name_ + " was closed after it was registered, and the number now means another file", EBADF));
  return {};
}

Result<std::optional<FileInfo>> file_info(const std::string& path) {
  struct stat status;
  if (::stat(path.c_str(), &status) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) return std::optional<FileInfo>{};
    return fail(errno_error("stat " + path, errno));
  }
  return std::optional<FileInfo>(FileInfo{static_cast<std::uint64_t>(status.st_size), status.st_mode, status.st_mtime});
}

}  // namespace nixl::core::fileio
