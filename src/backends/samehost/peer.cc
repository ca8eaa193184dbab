#include "backends/samehost/peer.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "base/bytes.h"

namespace nixl::core::samehost {
namespace {

constexpr std::uint32_t kAddressVersion = 1;
constexpr Nanoseconds kAskEvery = 20'000;
constexpr std::size_t kMaxText = 4096;
constexpr std::size_t kSmallBytes = 4096;  // up to here /proc/PID/mem is quicker than process_vm_writev

Result<std::string> read_text(const char* path) {
  Fd file(::open(path, O_RDONLY | O_CLOEXEC));
  if (!file) return fail(errno_error(path, errno, Code::kUnsupported));
  std::array<char, 128> text;
  const ssize_t got = ::read(file.get(), text.data(), text.size());
  if (got < 0) return fail(errno_error(path, errno, Code::kUnsupported));
  std::string_view view(text.data(), static_cast<std::size_t>(got));
  return std::string(view.substr(0, view.find('\n')));
}

Result<std::string> link_text(const char* path) {
  std::array<char, 128> text;
  const ssize_t got = ::readlink(path, text.data(), text.size());
  if (got < 0) return fail(errno_error(path, errno, Code::kUnsupported));
  return std::string(text.data(), static_cast<std::size_t>(got));
}

std::string forbidden_reason(std::uint32_t pid, int error) {
  const auto scope = read_text("/proc/sys/kernel/yama/ptrace_scope");
  std::string reason = "the kernel forbids copies to process " + std::to_string(pid) + ": " + errno_text(error);
  if (scope && *scope != "0")
    reason += "; /proc/sys/kernel/yama/ptrace_scope is " + *scope + " (0 allows it, 1 allows processes that opted in)";
  else
    reason += "; both must run as one user and not under a seccomp filter that refuses process_vm_readv";
  return reason;
}

}  // namespace

std::string Address::encode() const {
  ByteWriter out;
  out.put(kAddressVersion);
  out.put_text(host);
  out.put_all(pid, segment_fd, header_address, incarnation);
  out.put_text(doorbell);
  return out.take();
}

Result<Address> Address::decode(std::string_view bytes) {
  ByteReader in(bytes);
  NIXL_ASSIGN(const std::uint32_t version, in.get<std::uint32_t>());
  if (version != kAddressVersion)
    return fail(Code::kMismatch, "same-host address of version %u, %u understood", version, kAddressVersion);
  Address address;
  NIXL_ASSIGN(address.host, in.get_text(kMaxText));
  NIXL_TRY(in.get_all(address.pid, address.segment_fd, address.header_address, address.incarnation));
  NIXL_ASSIGN(address.doorbell, in.get_text(100));
  return address;
}

Result<std::string> host_identity() {
  NIXL_ASSIGN(std::string identity, read_text("/proc/sys/kernel/random/boot_id"));
  for (const char* name : {"/proc/self/ns/pid", "/proc/self/ns/net", "/proc/self/ns/user"}) {
    NIXL_ASSIGN(const std::string link, link_text(name));
    identity += " " + link;
  }
  return identity;
}

void allow_peers() noexcept {
  // One process can name a single tracer only, and an agent has many peers, hence ANY.
  const auto scope = read_text("/proc/sys/kernel/yama/ptrace_scope");
  if (scope && *scope == "1") ::prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
}

PeerProcess::PeerProcess(PeerProcess&& other) noexcept
    : pid_fd_(std::move(other.pid_fd_)),
      memory_(std::move(other.memory_)),
      segment_(std::move(other.segment_)),
      pid_(other.pid_) {}

Result<PeerProcess> PeerProcess::open(const Address& address) {
  PeerProcess peer;
  peer.pid_ = address.pid;
  peer.pid_fd_ = Fd(static_cast<int>(::syscall(SYS_pidfd_open, address.pid, 0)));
  if (!peer.pid_fd_) {
    if (errno == ESRCH) return fail(Code::kPeerLost, "process %u is gone", address.pid);
    return fail(errno_error("pidfd_open", errno, Code::kUnsupported));
  }
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%u/fd/%u", address.pid, address.segment_fd);
  Fd file(::open(path, O_RDWR | O_CLOEXEC));
  if (!file) {
    const int error = errno;
    if (!peer.alive(true)) return fail(Code::kPeerLost, "process %u is gone", address.pid);
    if (error == ENOENT)
      return fail(Code::kPeerLost, "process %u is not the one that was announced: %s is missing", address.pid, path);
    return fail(Code::kUnsupported, "%s: %s", path, forbidden_reason(address.pid, error).c_str());
  }
  NIXL_ASSIGN(peer.segment_, Segment::map(std::move(file), address.incarnation, address.pid));
  // The same word read across proves both the permission and that pid and segment belong together.
  std::uint64_t seen[2] = {};
  iovec local{seen, sizeof seen}, remote{reinterpret_cast<void*>(address.header_address), sizeof seen};
  if (::process_vm_readv(static_cast<pid_t>(address.pid), &local, 1, &remote, 1, 0) != sizeof seen) {
    const int error = errno;
    if (!peer.alive(true)) return fail(Code::kPeerLost, "process %u is gone", address.pid);
    return fail(Code::kUnsupported, "%s", forbidden_reason(address.pid, error).c_str());
  }
  if (seen[0] != kSegmentMagic || seen[1] != address.incarnation || !peer.alive(true))
    return fail(Code::kPeerLost, "process %u is not the one that was announced", address.pid);
  std::snprintf(path, sizeof path, "/proc/%u/mem", address.pid);
  peer.memory_ = Fd(::open(path, O_RDWR | O_CLOEXEC));
  if (!peer.alive(true)) return fail(Code::kPeerLost, "process %u is gone", address.pid);
  return peer;
}

bool PeerProcess::alive(bool now) noexcept {
  // A pid cannot be given to another process within the 20 us for which an answer is trusted: the parent must first
  // reap it and the kernel must then wrap around all pids.
  const Nanoseconds time = now_ns();
  if (!now && time - asked_at_.load(std::memory_order_relaxed) < kAskEvery) return true;
  pollfd poll{pid_fd_.get(), POLLIN, 0};
  if (::poll(&poll, 1, 0) != 0) return false;
  asked_at_.store(time, std::memory_order_relaxed);
  return true;
}

Result<void> PeerProcess::copy(Op op, std::span<iovec> local, std::span<iovec> remote) noexcept {
  if (local.size() == 1 && copy_small(op, local[0], remote[0])) return {};
  if (!alive()) return fail(Code::kPeerLost, "process %u died", pid_);
  std::size_t at = 0;
  while (at < local.size()) {
    const auto call = op == Op::kWrite ? ::process_vm_writev : ::process_vm_readv;
    ssize_t moved = call(static_cast<pid_t>(pid_), &local[at], local.size() - at, &remote[at], remote.size() - at, 0);
    if (moved < 0) return explain(errno, local[at], remote[at]);
    // A short count stops at the first piece that could not be reached; the next call, starting there, gives the
    // reason.
    const bool nothing = moved == 0 && local[at].iov_len != 0;
    if (nothing) return explain(EFAULT, local[at], remote[at]);
    while (at < local.size() && static_cast<std::size_t>(moved) >= local[at].iov_len) moved -= local[at++].iov_len;
    if (at < local.size()) {
      for (iovec* piece : {&local[at], &remote[at]}) {
        piece->iov_base = static_cast<char*>(piece->iov_base) + moved;
        piece->iov_len -= moved;
      }
    }
  }
  return {};
}

// false: not done, which another way may do or explain.
bool PeerProcess::copy_small(Op op, const iovec& local, const iovec& remote) noexcept {
  if (local.iov_len > kSmallBytes || !memory_) return false;
  // Not through pwrite(): a point of cancellation, which costs a program of several threads two atomic operations.
  const long moved = ::syscall(op == Op::kWrite ? SYS_pwrite64 : SYS_pread64, memory_.get(), local.iov_base,
                               local.iov_len, remote.iov_base);
  return moved == static_cast<long>(local.iov_len);
}

Result<void> PeerProcess::explain(int error, const iovec& local, const iovec& remote) noexcept {
  if (error == ESRCH || !alive(true)) return fail(Code::kPeerLost, "process %u died", pid_);
  if (error == EFAULT)
    return fail(Code::kIo,
                "copy between local address %p and address %p of process %u: memory there is not mapped (any more);"
                " was it freed while registered?",
                local.iov_base, remote.iov_base, pid_);
  if (error == EPERM) return fail(Code::kIo, "%s", forbidden_reason(pid_, error).c_str());
  return fail(errno_error("copy to process " + std::to_string(pid_), error));
}

}  // namespace nixl::core::samehost
