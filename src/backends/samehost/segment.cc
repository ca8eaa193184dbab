#include "backends/samehost/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <new>
#include <utility>

namespace nixl::core::samehost {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

Result<char*> map_bytes(int fd, std::size_t bytes) {
  void* const base = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED) return fail(errno_error("map the same-host segment", errno));
  return static_cast<char*>(base);
}

}  // namespace

Result<Segment> Segment::create(std::uint64_t incarnation) {
  Segment segment;
  segment.file_ = Fd(::memfd_create("nixl-samehost", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!segment.file_) return fail(errno_error("memfd_create for the same-host segment", errno));
  if (::ftruncate(segment.fd(), kBytes) != 0) return fail(errno_error("size the same-host segment", errno));
  if (::fcntl(segment.fd(), F_ADD_SEALS, kSeals) != 0) return fail(errno_error("seal the same-host segment", errno));
  NIXL_ASSIGN(segment.base_, map_bytes(segment.fd(), kBytes));
  // A fresh memory file is all zero, which is the initial state of every atomic in it.
  SegmentHeader& header = segment.header();
  header.magic = kSegmentMagic;
  header.incarnation = incarnation;
  header.pid = static_cast<std::uint32_t>(::getpid());
  header.num_lanes = kNumLanes;
  header.lane_bytes = kLaneBytes;
  header.num_slots = kNumSlots;
  return segment;
}

Result<Segment> Segment::map(Fd file, std::uint64_t incarnation, std::uint32_t pid) {
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) return fail(errno_error("fstat of the peer's segment", errno));
  const int seals = ::fcntl(file.get(), F_GET_SEALS);
  if (info.st_size != static_cast<off_t>(kBytes) || seals < 0 || (seals & kSeals) != kSeals)
    return fail(Code::kMismatch,
                "process %u: descriptor is no same-host segment (%lld bytes, seals %d; %zu, %d wanted)", pid,
                static_cast<long long>(info.st_size), seals, kBytes, kSeals);
  Segment segment;
  segment.file_ = std::move(file);
  NIXL_ASSIGN(segment.base_, map_bytes(segment.fd(), kBytes));
  const SegmentHeader& header = segment.header();
  if (header.magic != kSegmentMagic || header.num_lanes != kNumLanes || header.lane_bytes != kLaneBytes ||
      header.num_slots != kNumSlots)
    return fail(Code::kMismatch,
                "process %u: the segment has another format (magic %llx, %u lanes of %u bytes, %u slots)", pid,
                static_cast<unsigned long long>(header.magic), header.num_lanes, header.lane_bytes, header.num_slots);
  if (header.incarnation != incarnation || header.pid != pid)
    return fail(Code::kPeerLost, "process %u is not the one that was announced: incarnation %llx, %llx announced", pid,
                static_cast<unsigned long long>(header.incarnation), static_cast<unsigned long long>(incarnation));
  // The mapping holds the file; the descriptor is not needed any more.
  segment.file_.reset();
  return segment;
}

Segment::Segment(Segment&& other) noexcept
    : file_(std::move(other.file_)), base_(std::exchange(other.base_, nullptr)) {}

Segment& Segment::operator=(Segment&& other) noexcept {
  std::swap(file_, other.file_);
  std::swap(base_, other.base_);
  return *this;
}

Segment::~Segment() {
  if (base_) ::munmap(base_, kBytes);
}

}  // namespace nixl::core::samehost
