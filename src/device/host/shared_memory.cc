#include "device/host/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <map>
#include <mutex>
#include <utility>

namespace nixl::core {

namespace {

std::int64_t whole_pages(std::int64_t bytes) {
  const std::int64_t page = sysconf(_SC_PAGESIZE);
  return (bytes + page - 1) / page * page;
}

}  // namespace

struct SharedMemory::Mapping {
  std::byte* data = nullptr;
  std::int64_t size = 0;
  ~Mapping() {
    if (data) munmap(data, static_cast<std::size_t>(size));
  }
};

Result<std::shared_ptr<SharedMemory::Mapping>> SharedMemory::map(int descriptor) {
  // Of this process, by what they map. Never destroyed: handles may outlive static objects.
  static auto& mutex = *new std::mutex;
  static auto& mappings = *new std::map<std::pair<dev_t, ino_t>, std::weak_ptr<Mapping>>;
  struct stat info {};
  if (fstat(descriptor, &info) != 0) return fail(errno_error("stat of shared memory", errno));
  std::lock_guard lock(mutex);
  std::erase_if(mappings, [](const auto& entry) { return entry.second.expired(); });
  auto& known = mappings[{info.st_dev, info.st_ino}];
  auto mapping = known.lock();
  if (mapping && mapping->size >= info.st_size) return mapping;
  const auto size = static_cast<std::size_t>(info.st_size);
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, descriptor, 0);
  if (data == MAP_FAILED)
    return fail(errno_error("mapping " + std::to_string(size) + " bytes of shared memory", errno));
  mapping = std::make_shared<Mapping>();
  mapping->data = static_cast<std::byte*>(data);
  mapping->size = info.st_size;
  known = mapping;
  return mapping;
}

Result<SharedMemory> SharedMemory::create(const char* label, std::int64_t bytes) {
  if (bytes <= 0)
    return fail(Code::kInvalidArgument, "shared memory %s of %lld bytes: must be positive", label,
                static_cast<long long>(bytes));
  Fd descriptor(memfd_create(label, MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!descriptor) return fail(errno_error("memfd_create", errno));
  if (fcntl(descriptor.get(), F_ADD_SEALS, F_SEAL_SHRINK) != 0)
    return fail(errno_error("sealing shared memory", errno));
  SharedMemory memory;
  memory.descriptor_ = std::make_shared<Fd>(std::move(descriptor));
  NIXL_TRY(memory.grow(bytes));
  return memory;
}

Result<SharedMemory> SharedMemory::import(Fd descriptor) {
  const int seals = fcntl(descriptor.get(), F_GET_SEALS);
  if (seals < 0 || !(seals & F_SEAL_SHRINK))
    return fail(Code::kMismatch, "descriptor %d is not memory made by this library (seals %d)", descriptor.get(),
                seals);
  SharedMemory memory;
  memory.descriptor_ = std::make_shared<Fd>(std::move(descriptor));
  NIXL_TRY(memory.refresh());
  return memory;
}

Result<void> SharedMemory::grow(std::int64_t bytes) {
  if (mapping_ && mapping_->size >= bytes) return {};
  if (ftruncate(descriptor_->get(), whole_pages(bytes)) != 0)
    return fail(errno_error("growing shared memory to " + std::to_string(bytes) + " bytes", errno));
  return refresh();
}

Result<void> SharedMemory::refresh() {
  NIXL_ASSIGN(mapping_, map(descriptor_->get()));
  return {};
}

Result<Fd> SharedMemory::export_descriptor() const {
  return descriptor_->duplicate();
}

std::byte* SharedMemory::data() const noexcept {
  return mapping_ ? mapping_->data : nullptr;
}
std::int64_t SharedMemory::size() const noexcept {
  return mapping_ ? mapping_->size : 0;
}

}  // namespace nixl::core
