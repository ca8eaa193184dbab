// Usrbio: what is used of the 3FS client library. Structs are laid out as in its C header (hf3fs_usrbio.h); memory for them is the
// caller's. Functions answer 0 or a count, or -errno; reg_fd answers errno above 0.
#pragma once
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <memory>
#include <string>

#include "base/result.h"
#include "fileio/file.h"
#include "fileio/queue.h"

namespace nixl::core::hf3fs {

struct Iov {  // shared memory that the 3FS client reads and writes
  std::uint8_t* base;
  void* handle;
  char id[16];
  char mount_point[256];
  std::size_t size, block_size;
  int numa;
};
struct Ior {  // a ring of requests, of reads or of writes
  Iov iov;
  void* handle;
  char mount_point[256];
  bool for_read;
  int io_depth, priority, timeout;
  std::uint64_t flags;
};
struct Cqe {
  std::int32_t index, reserved;
  std::int64_t result;
  const void* userdata;
};

struct Usrbio {
  int (*extract_mount_point)(char* mount_point, int size, const char* path) = nullptr;  // length + 1, or -1
  int (*iov_create)(Iov*, const char* mount_point, std::size_t size, std::size_t block_size, int numa) = nullptr;
  void (*iov_destroy)(Iov*) = nullptr;
  int (*ior_create)(Ior*, const char* mount_point, int entries, bool for_read, int io_depth, int numa) = nullptr;
  void (*ior_destroy)(Ior*) = nullptr;
  int (*reg_fd)(int fd, std::uint64_t flags) = nullptr;
  void (*dereg_fd)(int fd) = nullptr;
  int (*prep_io)(const Ior*, const Iov*, bool read, void* memory, int fd, std::size_t offset, std::uint64_t bytes,
                 const void* userdata) = nullptr;
  int (*submit_ios)(const Ior*) = nullptr;
  int (*wait_for_ios)(const Ior*, Cqe*, int num_cqes, int least, const std::timespec* until) = nullptr;

  // Opened once a process. kUnsupported with what was looked for and the loader's words.
  static Result<const Usrbio*> load();

  // The 3FS mount that holds `path`; an error when it is none.
  Result<std::string> mount_of(const std::string& path) const;
};

// A file made known to the 3FS client, as long as this lives.
class RegisteredFile {
 public:
  static Result<std::shared_ptr<RegisteredFile>> open(const Usrbio& api, std::shared_ptr<fileio::File> file);
  ~RegisteredFile();
  RegisteredFile(const RegisteredFile&) = delete;
  const fileio::File& file() const noexcept { return *file_; }

 private:
  RegisteredFile(const Usrbio& api, std::shared_ptr<fileio::File> file) : api_(api), file_(std::move(file)) {}
  Result<void> add(int fd);

  const Usrbio& api_;
  const std::shared_ptr<fileio::File> file_;
  int fds_[2] = {-1, -1};  // the file, and with O_DIRECT its twin without
};

inline constexpr std::uint32_t kMostRunning = 64;

// The rings as a queue of `depth` (up to kMostRunning) reads and writes. Bytes pass through shared memory of the queue, so the 3FS
// client never touches the caller's: a request that it does not answer holds up nothing but itself.
Result<std::unique_ptr<fileio::Queue>> open_usrbio_queue(const Usrbio& api, const std::string& mount_point,
                                                         std::uint32_t depth);

}  // namespace nixl::core::hf3fs
