// For this backend's tests: a second process with one backend and one region, and what both sides need.
#pragma once
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>

#include "check.h"
#include "contract/entry.h"
#include "plans.h"

namespace nixl::core {
std::span<const BackendEntry> backends_of_samehost();
}

namespace nixl::core::samehost::test {

inline std::unique_ptr<Backend> open_backend(const char* name, Events* events = nullptr) {
  BackendConfig config;
  config.self = {name, 1};
  config.events = events;
  return std::move(*CHECK_OK(backends_of_samehost()[0].open(std::move(config))));
}

inline std::uint64_t at(const void* p) {
  return reinterpret_cast<std::uint64_t>(p);
}
inline Region region_of(const void* p, std::size_t bytes) {
  return {MemKind::kDram, at(p), bytes, 0, ""};
}

using core::test::add_block;

// Our region, the peer, and the region imported from it.
struct Link {
  Link(Backend& backend, const std::string& address, const std::string& key, const Region& local,
       const Region& remote) {
    ours = std::move(*CHECK_OK(backend.add_region(local)));
    peer = std::move(*CHECK_OK(backend.connect({"target", 7}, address)));
    theirs = std::move(*CHECK_OK(backend.import_region(*peer, remote, key)));
  }
  Plan plan(Op op) const { return core::test::plan_between(op, *peer, *ours, *theirs); }
  std::unique_ptr<LocalRegion> ours;
  std::unique_ptr<Connection> peer;
  std::unique_ptr<RemoteRegion> theirs;
};

inline Result<void> run(Transfer& transfer, std::optional<std::string_view> message = {}) {
  NIXL_ASSIGN(TransferState state, transfer.submit(message));
  while (state == TransferState::kRunning) {
    NIXL_ASSIGN(state, transfer.poll());
  }
  return {};
}

inline void send_text(int fd, const std::string& text) {
  const auto size = static_cast<std::uint32_t>(text.size());
  CHECK_EQ(::write(fd, &size, 4), 4);
  CHECK_EQ(::write(fd, text.data(), size), static_cast<ssize_t>(size));
}
inline std::string read_text(int fd) {
  std::uint32_t size;
  CHECK_EQ(::recv(fd, &size, 4, MSG_WAITALL), 4);
  std::string text(size, 0);
  if (size) CHECK_EQ(::recv(fd, text.data(), size, MSG_WAITALL), static_cast<ssize_t>(size));  // of 0 it would block
  return text;
}

// A process that runs `serve` with its end of a socket pair: it sends how it and its region are reached, and then does
// what it is told, one letter at a time.
class TargetProcess {
 public:
  explicit TargetProcess(const std::function<void(int)>& serve) {
    int ends[2];
    CHECK_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    pid = ::fork();
    if (pid == 0) {
      ::close(ends[0]);
      ::alarm(100);
      serve(ends[1]);
      ::_exit(0);
    }
    ::close(ends[1]);
    fd = ends[0];
    address = read_text(fd);
    key = read_text(fd);
  }
  ~TargetProcess() {
    if (pid > 0) end();
    ::close(fd);
  }
  TargetProcess(const TargetProcess&) = delete;
  static void send_address_and_key(int fd, Backend& backend, const LocalRegion& region) {
    send_text(fd, *CHECK_OK(backend.export_connection()));
    send_text(fd, *CHECK_OK(backend.export_region(region)));
  }
  void end() {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    pid = -1;
  }
  void tell(char what) const { CHECK_EQ(::write(fd, &what, 1), 1); }
  std::string ask(char what) const {
    tell(what);
    return read_text(fd);
  }

  pid_t pid = -1;
  int fd = -1;
  std::string address, key;
};

}  // namespace nixl::core::samehost::test
