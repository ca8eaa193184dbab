// Raw UCX between two processes, one-sided operations as a program written straight on ucp would do them: the figure
// that the network path of the agent is compared with.
//   raw_ucx target IP PORT          serves one initiator, then exits; prints "ready PORT" (PORT 0: any)
//   raw_ucx initiator IP PORT       runs the cases and prints one JSON object: seconds, best of the repetitions
//   raw_ucx open                    prints the seconds that opening the library, a context and a worker take
// UCX is configured by its environment variables; the library is chosen as the UCX backend chooses it.
#include <arpa/inet.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backends/ucx/context.h"
#include "base/clock.h"

using namespace nixl::core;
using ucx::Api;

namespace {

constexpr std::size_t kBytes = 256 << 20, kCut = 16 << 20, kPiece = 16 << 10, kPieces = 10'000;

[[noreturn]] void die(const std::string& why) {
  std::fprintf(stderr, "raw_ucx: %s\n", why.c_str());
  std::exit(1);
}
void send_text(int fd, const std::string& text) {
  const std::uint64_t size = text.size();
  if (write(fd, &size, 8) != 8 || write(fd, text.data(), size) != static_cast<ssize_t>(size)) die("send");
}
std::string receive_text(int fd) {
  std::uint64_t size = 0;
  if (recv(fd, &size, 8, MSG_WAITALL) != 8) die("receive");
  std::string text(size, '\0');
  if (recv(fd, text.data(), size, MSG_WAITALL) != static_cast<ssize_t>(size)) die("receive");
  return text;
}

struct Side {
  std::unique_ptr<ucx::Context> context;
  const Api* api = nullptr;
  ucp_worker_h worker = nullptr;
  std::string address;
  char* bytes = nullptr;
  std::unique_ptr<ucx::Memory> memory;

  Side() {
    auto opened = ucx::Context::open({});
    if (!opened) die(opened.error().reason);
    context = std::move(*opened);
    api = &context->api();
    ucp_worker_params_t params{};
    params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    params.thread_mode = UCS_THREAD_MODE_SINGLE;
    if (api->worker_create(context->handle(), &params, &worker) != UCS_OK) die("worker");
    ucp_worker_attr_t attributes{};
    attributes.field_mask = UCP_WORKER_ATTR_FIELD_ADDRESS;
    if (api->worker_query(worker, &attributes) != UCS_OK) die("address");
    address.assign(reinterpret_cast<const char*>(attributes.address), attributes.address_length);
    void* const mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) die("mmap");
    madvise(mapped, kBytes, MADV_HUGEPAGE);  // as NumPy does, whose arrays the agent is measured with
    bytes = static_cast<char*>(mapped);
    std::memset(bytes, 1, kBytes);
    auto registered =
        ucx::Memory::open(*context, {MemKind::kDram, reinterpret_cast<std::uint64_t>(bytes), kBytes, 0, ""});
    if (!registered) die(registered.error().reason);
    memory = std::move(*registered);
  }
};

sockaddr_in socket_address(const char* ip, const char* port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<std::uint16_t>(std::atoi(port)));
  if (inet_pton(AF_INET, ip, &address.sin_addr) != 1) die("an IPv4 address is needed");
  return address;
}

int serve(const char* ip, const char* port) {
  const int listener = socket(AF_INET, SOCK_STREAM, 0);
  const int one = 1;
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  sockaddr_in here = socket_address(ip, port);
  if (bind(listener, reinterpret_cast<sockaddr*>(&here), sizeof here) || listen(listener, 1)) die("listen");
  socklen_t size = sizeof here;
  getsockname(listener, reinterpret_cast<sockaddr*>(&here), &size);
  std::printf("ready %d\n", ntohs(here.sin_port));
  std::fflush(stdout);
  const int fd = accept(listener, nullptr, nullptr);
  Side side;
  send_text(fd, side.address);
  send_text(fd, side.memory->remote_key());
  send_text(fd, std::to_string(reinterpret_cast<std::uint64_t>(side.bytes)));
  char byte = 0;
  for (unsigned round = 0;; ++round) {
    side.api->worker_progress(side.worker);
    if (round % 4096 == 0 && recv(fd, &byte, 1, MSG_DONTWAIT) == 0) break;
  }
  std::_Exit(0);
}

struct Initiator {
  Side side;
  ucp_ep_h ep = nullptr;
  ucp_rkey_h key = nullptr;
  std::uint64_t remote = 0;
  int in_flight = 0;
  bool connecting = true;
  ucs_status_t failure = UCS_OK;

  void failed(const char* what, ucs_status_t status) {
    if (!connecting) die(ucx::operation_error(**ucx::open_api(), what, status).reason);
    failure = status;
  }
  static void ended(void* request, ucs_status_t status, void* data) {
    auto* const self = static_cast<Initiator*>(data);
    if (status != UCS_OK) self->failed("an operation", status);
    --self->in_flight;
    (*ucx::open_api())->request_free(request);
  }
  static void on_error(void* self, ucp_ep_h, ucs_status_t status) {
    static_cast<Initiator*>(self)->failed("the endpoint", status);
  }
  // An endpoint that has carried something. UCX may report the end of its own helper connection, reset while two busy
  // processes connect, as the endpoint's failure: then the endpoint is opened again.
  void connect(const std::string& address, const std::string& packed_key) {
    for (int attempt = 1; connecting; ++attempt) {
      failure = UCS_OK;
      ucp_ep_params_t params{};
      params.field_mask =
          UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER;
      params.address = reinterpret_cast<const ucp_address_t*>(address.data());
      params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
      params.err_handler = {&Initiator::on_error, this};
      if (side.api->ep_create(side.worker, &params, &ep) != UCS_OK) die("endpoint");
      if (side.api->ep_rkey_unpack(ep, packed_key.data(), &key) != UCS_OK) die("key");
      for (int i = 0; i < 100 && failure == UCS_OK; ++i) {
        copy(true, 0, 64, 64);
        flush();
      }
      connecting = failure != UCS_OK;
      if (connecting && attempt == 3) die(ucx::operation_error(*side.api, "three endpoints", failure).reason);
    }
  }
  ucp_request_param_t param() {
    ucp_request_param_t param{};
    param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
    param.cb.send = &Initiator::ended;
    param.user_data = this;
    return param;
  }
  void count(ucs_status_ptr_t request) {
    if (UCS_PTR_IS_ERR(request))
      failed("an operation", UCS_PTR_STATUS(request));
    else
      in_flight += request != nullptr;
  }
  void wait(int limit) {
    while (in_flight > limit) side.api->worker_progress(side.worker);
  }
  void copy(bool write, std::size_t local_at, std::size_t remote_at, std::size_t size) {
    ucp_request_param_t with_memory = param();
    with_memory.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
    with_memory.memh = side.memory->handle();
    count(write ? side.api->put_nbx(ep, side.bytes + local_at, size, remote + remote_at, key, &with_memory)
                : side.api->get_nbx(ep, side.bytes + local_at, size, remote + remote_at, key, &with_memory));
  }
  void flush() {
    const ucp_request_param_t plain = param();
    count(side.api->ep_flush_nbx(ep, &plain));
    wait(0);
  }
};

double best(int repetitions, int inner, const auto& body) {
  double least = 1e9;
  for (int i = 0; i < repetitions; ++i) {
    const Nanoseconds start = now_ns();
    for (int j = 0; j < inner; ++j) body();
    least = std::min(least, static_cast<double>(now_ns() - start) * 1e-9 / inner);
  }
  return least;
}

int initiate(const char* ip, const char* port) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in there = socket_address(ip, port);
  if (connect(fd, reinterpret_cast<sockaddr*>(&there), sizeof there)) die("connect");
  Initiator self;
  const std::string address = receive_text(fd), key = receive_text(fd);
  self.remote = std::stoull(receive_text(fd));
  self.connect(address, key);

  std::vector<std::size_t> order(kPieces);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(1));
  const auto small = [&] {
    self.copy(true, 0, 64, 64);
    self.flush();
  };
  const auto big_write = [&] {
    self.copy(true, 0, 0, kBytes);
    self.flush();
  };
  const auto cut_write = [&] {
    for (std::size_t at = 0; at < kBytes; at += kCut) self.copy(true, at, at, kCut);
    self.flush();
  };
  const auto big_read = [&] {
    self.copy(false, 0, 0, kBytes);
    self.wait(0);
  };
  const auto list = [&] {
    for (std::size_t i = 0; i < kPieces; ++i) {
      self.copy(true, i * kPiece, order[i] * kPiece, kPiece);
      self.wait(127);
    }
    self.flush();
  };
  const double latency = best(5, 400, small);
  big_write();
  const double write = std::min(best(5, 1, big_write), best(5, 1, cut_write));  // whichever UCX does better
  const double read = best(3, 1, big_read);
  const double scattered = best(5, 1, list);
  std::printf("{\"latency_64_s\": %.9f, \"write_256m_s\": %.6f, \"read_256m_s\": %.6f, \"list_16k_s\": %.6f}\n",
              latency, write, read, scattered);
  std::fflush(stdout);
  std::_Exit(0);
}

int open_only() {
  const Nanoseconds start = now_ns();
  auto context = ucx::Context::open({});
  if (!context) die(context.error().reason);
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  ucp_worker_h worker = nullptr;
  if ((*context)->api().worker_create((*context)->handle(), &params, &worker) != UCS_OK) die("worker");
  std::printf("{\"open_s\": %.6f}\n", static_cast<double>(now_ns() - start) * 1e-9);
  std::fflush(stdout);
  std::_Exit(0);
}

}  // namespace

int main(int argc, char** argv) {
  ::setenv("UCX_MEM_BISTRO_GRACE_DURATION", "50ms", 0);  // UCX as it comes: our own use of it shortens this
  if (argc == 2 && std::string(argv[1]) == "open") return open_only();
  if (argc == 4 && std::string(argv[1]) == "target") return serve(argv[2], argv[3]);
  if (argc == 4 && std::string(argv[1]) == "initiator") return initiate(argv[2], argv[3]);
  std::fprintf(stderr, "usage: raw_ucx target|initiator IP PORT, or raw_ucx open\n");
  return 2;
}
