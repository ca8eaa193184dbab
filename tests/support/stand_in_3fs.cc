// Stands in for the 3FS client library: the directory STAND_IN_3FS_MOUNT is the mount, its files are read and written by pread and
// pwrite, the newest request of a ring first. As strict as the real one about what may be asked: files must be registered, memory must
// lie in an iov, a ring takes reads or writes only. STAND_IN_FAULT: "short" moves at most 1000 bytes a request, "io" answers every one
// with EIO, "ring" makes a ring fail when it is waited for, "register" refuses files, "memory" gives none.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <mutex>
#include <set>
#include <vector>

namespace {

struct Iov {
  std::uint8_t* base;
  void* handle;
  char id[16];
  char mount_point[256];
  std::size_t size, block_size;
  int numa;
};
struct Ior {
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
struct Request {
  int index, fd;
  std::uint8_t* memory;
  std::size_t offset, bytes;
  const void* userdata;
};
struct Ring {
  std::size_t entries;
  std::vector<Request> waiting;
};

std::mutex mutex;
std::set<int> files;

bool fault(const char* name) {
  const char* wanted = std::getenv("STAND_IN_FAULT");
  return wanted && !std::strcmp(wanted, name);
}
Ring* ring_of(const Ior* ior) {
  return static_cast<Ring*>(ior->handle);
}

}  // namespace

extern "C" {

int hf3fs_extract_mount_point(char* mount, int size, const char* path) {
  const char* root = std::getenv("STAND_IN_3FS_MOUNT");
  if (!root || std::strncmp(path, root, std::strlen(root)) != 0) return -1;
  const int length = static_cast<int>(std::strlen(root)) + 1;
  if (length <= size) std::memcpy(mount, root, static_cast<std::size_t>(length));
  return length;
}

int hf3fs_iovcreate(Iov* iov, const char*, std::size_t size, std::size_t block_size, int numa) {
  if (fault("memory")) return -ENOMEM;
  *iov = {};
  iov->base = static_cast<std::uint8_t*>(std::aligned_alloc(4096, size));
  iov->size = size;
  iov->block_size = block_size;
  iov->numa = numa;
  return iov->base ? 0 : -ENOMEM;
}
void hf3fs_iovdestroy(Iov* iov) {
  std::free(iov->base);
}

int hf3fs_iorcreate(Ior* ior, const char*, int entries, bool for_read, int io_depth, int) {
  *ior = {};
  ior->for_read = for_read;
  ior->io_depth = io_depth;
  ior->handle = new Ring{static_cast<std::size_t>(entries), {}};
  return 0;
}
void hf3fs_iordestroy(Ior* ior) {
  delete ring_of(ior);
}

int hf3fs_reg_fd(int fd, std::uint64_t) {
  if (fault("register")) return EACCES;
  const std::lock_guard lock(mutex);
  return files.insert(fd).second ? -fd : EEXIST;
}
void hf3fs_dereg_fd(int fd) {
  const std::lock_guard lock(mutex);
  if (files.erase(fd) == 0) std::abort();
}

int hf3fs_prep_io(const Ior* ior, const Iov* iov, bool read, void* memory, int fd, std::size_t offset,
                  std::uint64_t bytes, const void* userdata) {
  auto* const start = static_cast<std::uint8_t*>(memory);
  Ring& ring = *ring_of(ior);
  const std::lock_guard lock(mutex);
  if (!files.count(fd)) return -EBADF;
  if (read != ior->for_read || start < iov->base || start + bytes > iov->base + iov->size) return -EINVAL;
  if (ring.waiting.size() == ring.entries) return -EAGAIN;
  const int index = static_cast<int>(ring.waiting.size());
  ring.waiting.push_back({index, fd, start, offset, bytes, userdata});
  return index;
}
int hf3fs_submit_ios(const Ior*) {
  return 0;
}

int hf3fs_wait_for_ios(const Ior* ior, Cqe* cqes, int num_cqes, int, const std::timespec*) {
  if (fault("ring")) return -EPIPE;
  Ring& ring = *ring_of(ior);
  const std::lock_guard lock(mutex);
  int count = 0;
  for (; count < num_cqes && !ring.waiting.empty(); ++count) {
    const Request request = ring.waiting.back();
    ring.waiting.pop_back();
    const std::size_t bytes = fault("short") ? std::min<std::size_t>(request.bytes, 1000) : request.bytes;
    const auto offset = static_cast<off_t>(request.offset);
    std::int64_t result = -EIO;
    if (!fault("io")) {
      result = ior->for_read ? ::pread(request.fd, request.memory, bytes, offset)
                             : ::pwrite(request.fd, request.memory, bytes, offset);
      if (result < 0) result = -errno;
    }
    cqes[count] = {request.index, 0, result, request.userdata};
  }
  return count;
}

}  // extern "C"
