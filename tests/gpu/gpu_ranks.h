// Ranks as processes for the native GPU tests and benchmarks: forked before CUDA is touched, joined pairwise by sockets over
// which they exchange their memory. A failed check in any rank ends the run; every wait has a limit.
#pragma once
#include <cuda_runtime_api.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "check.h"
#include "ep/path.h"

namespace gpu_test {

using namespace nixl::core;
using namespace nixl::core::ep;

#define CUDA_OK(call)                                                                           \
  do {                                                                                          \
    if (const cudaError_t status_ = (call); status_ != cudaSuccess)                             \
      check::failed(__FILE__, __LINE__, std::string(#call ": ") + cudaGetErrorString(status_)); \
  } while (0)

template <typename T>
T value(Result<T> result, const char* file, int line) {
  if (!result) check::failed(file, line, result.error().reason);
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}
#define OK(call) gpu_test::value((call), __FILE__, __LINE__)

// One rank's sockets to the others.
class Mesh {
 public:
  Mesh(int rank, std::vector<int> sockets) : rank_(rank), sockets_(std::move(sockets)) {}
  int rank() const { return rank_; }
  int size() const { return static_cast<int>(sockets_.size()); }

  void send(int to, const void* data, std::size_t bytes, const std::vector<Fd>* descriptors = nullptr) {
    iovec piece{const_cast<void*>(data), bytes};
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)] = {};
    if (descriptors && !descriptors->empty()) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(sizeof(int) * descriptors->size());
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(sizeof(int) * descriptors->size());
      for (std::size_t i = 0; i < descriptors->size(); ++i) {
        const int fd = (*descriptors)[i].get();
        std::memcpy(CMSG_DATA(header) + i * sizeof(int), &fd, sizeof(int));
      }
    }
    if (::sendmsg(sockets_[to], &message, MSG_NOSIGNAL) != static_cast<ssize_t>(bytes))
      check::failed(__FILE__, __LINE__, "send to rank " + std::to_string(to));
  }
  std::string receive(int from, std::vector<Fd>* descriptors = nullptr) {
    pollfd ready{sockets_[from], POLLIN, 0};
    if (::poll(&ready, 1, 60'000) != 1)
      check::failed(__FILE__, __LINE__, "rank " + std::to_string(from) + " is silent");
    char bytes[65536];
    iovec piece{bytes, sizeof(bytes)};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int) * 16)];
    msghdr message{};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t got = ::recvmsg(sockets_[from], &message, 0);
    if (got <= 0) check::failed(__FILE__, __LINE__, "rank " + std::to_string(from) + " ended");
    for (cmsghdr* h = CMSG_FIRSTHDR(&message); h; h = CMSG_NXTHDR(&message, h))
      for (std::size_t i = 0; descriptors && i < (h->cmsg_len - CMSG_LEN(0)) / sizeof(int); ++i) {
        int fd;
        std::memcpy(&fd, CMSG_DATA(h) + i * sizeof(int), sizeof(int));
        descriptors->emplace_back(fd);
      }
    return std::string(bytes, static_cast<std::size_t>(got));
  }
  void barrier() { (void)gather(0.0); }
  // Every rank's number.
  std::vector<double> gather(double own) {
    std::vector<double> all(sockets_.size(), own);
    for (int r = 0; r < size(); ++r)
      if (r != rank_) send(r, &own, sizeof(own));
    for (int r = 0; r < size(); ++r)
      if (r != rank_) std::memcpy(&all[r], receive(r).data(), sizeof(double));
    return all;
  }
  double worst(double own) {
    const auto all = gather(own);
    return *std::max_element(all.begin(), all.end());
  }

 private:
  int rank_;
  std::vector<int> sockets_;
};

// Exchanges memory with every listed rank; all of them call this together. Unmasks when `activate`.
inline void connect(Path& path, Mesh& mesh, std::uint32_t incarnation, bool activate = true) {
  const Export own = OK(path.export_memory());
  std::string message(sizeof(incarnation), '\0');
  std::memcpy(message.data(), &incarnation, sizeof(incarnation));
  message += own.description;
  for (int r = 0; r < mesh.size(); ++r)
    if (r != mesh.rank()) mesh.send(r, message.data(), message.size(), &own.descriptors);
  std::vector<int> others;
  for (int r = 0; r < mesh.size(); ++r) {
    if (r == mesh.rank()) continue;
    Export theirs;
    const std::string text = mesh.receive(r, &theirs.descriptors);
    PeerIdentity identity{r, 0};
    std::memcpy(&identity.incarnation, text.data(), sizeof(incarnation));
    theirs.description = text.substr(sizeof(incarnation));
    OK(path.attach(identity, std::move(theirs)));
    others.push_back(r);
  }
  mesh.barrier();
  if (activate) OK(path.set_mask(others, false, nullptr));
  mesh.barrier();
}

// Number of GPUs, found in a child: the caller may fork afterwards.
inline int count_gpus() {
  const pid_t child = ::fork();
  if (child == 0) {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    ::_exit(std::min(count, 64));
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
}

// Done when it returns: cudaMemset alone may come after a kernel of another stream that is launched later.
inline void fill(void* data, int byte, std::size_t bytes) {
  CUDA_OK(cudaMemset(data, byte, bytes));
  CUDA_OK(cudaStreamSynchronize(nullptr));
}

// Forks `ranks` processes that run `body`, rank r on GPU r % gpus. Returns the number that failed.
inline int run_ranks(int ranks, int gpus, const std::function<void(Mesh&)>& body, int limit_seconds) {
  std::vector<std::vector<int>> sockets(ranks, std::vector<int>(ranks, -1));
  for (int a = 0; a < ranks; ++a)
    for (int b = a + 1; b < ranks; ++b) {
      int pair[2];
      if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
        check::failed(__FILE__, __LINE__, "socketpair");
      sockets[a][b] = pair[0];
      sockets[b][a] = pair[1];
    }
  std::vector<pid_t> children;
  std::fflush(nullptr);
  for (int r = 0; r < ranks; ++r) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::alarm(static_cast<unsigned>(limit_seconds));
      for (int a = 0; a < ranks; ++a)
        for (int b = 0; b < ranks; ++b)
          if (a != r && sockets[a][b] >= 0) ::close(sockets[a][b]);
      CUDA_OK(cudaSetDevice(r % gpus));
      Mesh mesh(r, sockets[r]);
      body(mesh);
      std::fflush(nullptr);
      ::_exit(0);
    }
    children.push_back(child);
  }
  for (auto& row : sockets)
    for (int fd : row)
      if (fd >= 0) ::close(fd);
  int failed = 0;
  for (std::size_t r = 0; r < children.size(); ++r) {
    int status = 0;
    ::waitpid(children[r], &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
      std::fprintf(stderr, "rank %zu ended with %s %d\n", r, WIFEXITED(status) ? "exit status" : "signal",
                   WIFEXITED(status) ? WEXITSTATUS(status) : WTERMSIG(status));
      ++failed;
    }
  }
  return failed;
}

// One set of processes runs items 0 to count - 1 in turn; behind an item that failed a new set goes on. Returns those that failed.
// `limit_seconds` is for a set.
inline std::vector<int> run_in_turn(int count, int ranks, int gpus, const std::function<void(Mesh&, int)>& body,
                                    int limit_seconds) {
  auto* at = static_cast<int*>(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  CHECK(at != MAP_FAILED);
  std::vector<int> failed;
  for (int begin = 0; begin < count; begin = *at + 1) {
    *at = begin;
    const auto set = [&](Mesh& mesh) {
      for (int i = begin; i < count; ++i) {
        body(mesh, i);
        mesh.barrier();
        if (mesh.rank() == 0) *at = i + 1;
        mesh.barrier();
      }
    };
    if (run_ranks(ranks, gpus, set, limit_seconds) > 0) failed.push_back(*at);
  }
  (void)::munmap(at, 4096);
  return failed;
}

// Device memory of a test.
template <typename T>
class Device {
 public:
  Device() = default;
  explicit Device(std::size_t count) : count_(count) {
    CUDA_OK(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<std::size_t>(count * sizeof(T), 256)));
  }
  explicit Device(const std::vector<T>& host) : Device(host.size()) { upload(host); }
  Device(Device&& other) noexcept : data_(std::exchange(other.data_, nullptr)), count_(other.count_) {}
  Device& operator=(Device&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Device() {
    if (data_) (void)cudaFree(data_);
  }
  T* get() const { return data_; }
  std::size_t size() const { return count_; }
  void upload(const std::vector<T>& host) {
    CUDA_OK(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> download() const { return download(0, count_); }
  std::vector<T> download(std::size_t first, std::size_t count) const {
    std::vector<T> host(count);
    CUDA_OK(cudaMemcpy(host.data(), data_ + first, count * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  void fill(int byte) { gpu_test::fill(data_, byte, count_ * sizeof(T)); }

 private:
  T* data_ = nullptr;
  std::size_t count_ = 0;
};

}  // namespace gpu_test
