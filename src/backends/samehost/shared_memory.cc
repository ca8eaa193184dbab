#include "backends/samehost/shared_memory.h"

#include <dirent.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cstdlib>

#include "base/env.h"

namespace nixl::core::samehost {
namespace {

constexpr const char* kEnv = "NIXL_SAME_HOST_MAP";
constexpr int kMostStretches = 64;  // of one region: the kernel splits a mapping when its flags change

// linux/fs.h of Linux 6.11, for older headers: the mapping that covers an address of /proc/PID/maps.
struct MapQuery {
  std::uint64_t size = sizeof(MapQuery);
  std::uint64_t query_flags = 0;
  std::uint64_t query_address = 0;
  std::uint64_t start = 0, end = 0, flags = 0, page_size = 0, offset = 0, inode = 0;
  std::uint32_t device_major = 0, device_minor = 0, name_size = 0, build_id_size = 0;
  std::uint64_t name_address = 0, build_id_address = 0;
};
static_assert(sizeof(MapQuery) == 104);
constexpr unsigned long kMapQuery = _IOWR('f', 17, MapQuery);
constexpr std::uint64_t kReadable = 1, kWritable = 2, kShared = 8;

// A descriptor of ours for that file, open for both ways.
Fd descriptor_of(std::uint64_t device, std::uint64_t inode) {
  DIR* const folder = ::opendir("/proc/self/fd");
  if (!folder) return {};
  Fd found;
  while (const dirent* const entry = ::readdir(folder)) {
    const int fd = std::atoi(entry->d_name);
    struct stat about {};
    if (entry->d_name[0] == '.' || ::fstat(fd, &about) != 0 || about.st_ino != inode || about.st_dev != device)
      continue;
    if ((::fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDWR) continue;
    found.reset(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
    break;
  }
  ::closedir(folder);
  return found;
}

}  // namespace

void SharedExport::encode(ByteWriter& out) const {
  out.put_all(static_cast<std::uint32_t>(file_.get()), device_, inode_, offset_);
}

SharedMapping::~SharedMapping() {
  lock.reset();
  if (base_) ::munmap(base_, bytes_);
}

Result<SharedMemory> SharedMemory::open() {
  SharedMemory memory;
  NIXL_ASSIGN(const std::optional<bool> wanted, env_bool(kEnv));
  if (wanted) memory.which_ = *wanted ? Which::kAny : Which::kNone;
  if (memory.which_ != Which::kNone) memory.maps_.reset(::open("/proc/self/maps", O_RDONLY | O_CLOEXEC));
  return memory;
}

// Files of memory with pages of the usual size, that stay as long as they are.
bool SharedMemory::usable(int file) const noexcept {
  struct statfs about {};
  if (::fstatfs(file, &about) != 0 || about.f_type != TMPFS_MAGIC) return false;
  if (which_ == Which::kAny) return true;
  const int seals = ::fcntl(file, F_GET_SEALS);
  return which_ == Which::kSealed && seals >= 0 && (seals & F_SEAL_SHRINK) != 0;
}

std::optional<SharedExport> SharedMemory::find(const Region& region) const noexcept {
  if (!maps_ || region.length == 0) return std::nullopt;
  SharedExport found;
  const std::uint64_t end = region.address + region.length;
  int stretches = 0;
  for (std::uint64_t at = region.address; at < end; ++stretches) {
    MapQuery query;
    query.query_address = at;
    if (stretches == kMostStretches || ::ioctl(maps_.get(), kMapQuery, &query) != 0) return std::nullopt;
    constexpr std::uint64_t kWanted = kReadable | kWritable | kShared;
    if ((query.flags & kWanted) != kWanted || query.inode == 0) return std::nullopt;
    const std::uint64_t device = makedev(query.device_major, query.device_minor);
    const std::uint64_t offset = query.offset + (at - query.start);
    if (at == region.address) {
      found.device_ = device;
      found.inode_ = query.inode;
      found.offset_ = offset;
    } else if (device != found.device_ || query.inode != found.inode_ ||
               offset != found.offset_ + (at - region.address)) {
      return std::nullopt;
    }
    at = query.end;
  }
  found.file_ = descriptor_of(found.device_, found.inode_);
  if (!found.file_ || !usable(found.file_.get())) return std::nullopt;
  return found;
}

Result<std::unique_ptr<SharedMapping>> SharedMemory::map(PeerProcess& peer, const Region& region,
                                                         ByteReader& key) const {
  NIXL_ASSIGN(const std::uint32_t descriptor, key.get<std::uint32_t>());
  NIXL_ASSIGN(const std::uint64_t device, key.get<std::uint64_t>());
  NIXL_ASSIGN(const std::uint64_t inode, key.get<std::uint64_t>());
  NIXL_ASSIGN(const std::uint64_t offset, key.get<std::uint64_t>());
  const Fd file(static_cast<int>(::syscall(SYS_pidfd_getfd, peer.pid_fd(), descriptor, 0)));
  struct stat about {};
  if (!file || !usable(file.get()) || ::fstat(file.get(), &about) != 0) return nullptr;
  const auto size = static_cast<std::uint64_t>(about.st_size);
  const std::uint64_t page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)), lead = offset % page;
  if (about.st_dev != device || about.st_ino != inode || offset > size || region.length > size - offset) return nullptr;
  auto mapping = std::make_unique<SharedMapping>();
  void* const base = ::mmap(nullptr, region.length + lead, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(),
                            static_cast<off_t>(offset - lead));
  if (base == MAP_FAILED) return nullptr;
  mapping->base_ = base;
  mapping->bytes_ = region.length + lead;
  mapping->delta_ = reinterpret_cast<std::uint64_t>(base) + lead - region.address;
  return mapping;
}

}  // namespace nixl::core::samehost
