// Stands in for the Mooncake transfer engine: the kernel copies between the processes, a peer is found by the name of its segment. As strict
// as the real one about what may be asked: memory is registered once and not in part, sources must be registered, what is far must be
// registered there, a segment has at most 1024 requests under way. STAND_IN_FAULT: "refuse" fails every submission, "half" starts half of it
// and fails, "fail" ends every request with FAILED, "stall" ends none, "memory" registers none, "engine" makes none.
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

struct Request {
  int opcode;
  void* source;
  std::int32_t segment;
  std::uint32_t file;
  std::uint64_t target, length;
};
struct Status {
  int state;
  std::uint64_t bytes;
};
enum State { kWaiting = 0, kInvalid = 2, kCompleted = 4, kFailed = 6 };

struct Engine {
  std::mutex mutex;
  std::string name;
  int listener = -1;
  std::thread answering;
  std::atomic<bool> stopping{false};
  std::map<std::uint64_t, std::uint64_t> memory;  // start, end
  std::vector<std::string> segments;
  std::map<std::int32_t, int> under_way;

  bool holds(std::uint64_t address, std::uint64_t length) {
    auto next = memory.upper_bound(address);
    return next != memory.begin() && address + length <= std::prev(next)->second;
  }
};
struct Batch {
  std::size_t size;
  std::vector<Request> requests;
  std::vector<bool> ended;
};

std::atomic<int> next_port{1};

bool fault(const char* name) {
  const char* wanted = std::getenv("STAND_IN_FAULT");
  return wanted && !std::strcmp(wanted, name);
}

sockaddr_un address_of(const std::string& name, socklen_t& size) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string text = "nixl_stand_in_mooncake/" + name;
  std::memcpy(address.sun_path + 1, text.data(), text.size());
  size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return address;
}

// Answers what peers ask: who we are (by the kernel), and whether memory is registered.
void answer(Engine& engine) {
  while (!engine.stopping) {
    pollfd ready{engine.listener, POLLIN, 0};  // not accept: it takes a descriptor before there is somebody
    if (::poll(&ready, 1, -1) < 0 || engine.stopping) continue;
    const int caller = ::accept4(engine.listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (caller < 0) continue;
    std::uint64_t asked[2];
    if (::recv(caller, asked, sizeof asked, MSG_WAITALL) == sizeof asked) {
      const std::lock_guard lock(engine.mutex);
      const char yes = asked[1] == 0 || engine.holds(asked[0], asked[1]);
      (void)!::write(caller, &yes, 1);
    }
    ::close(caller);
  }
}

// The process of a segment that has this memory; 0: gone, or it has not.
pid_t owner_of(const std::string& name, std::uint64_t address, std::uint64_t length) {
  socklen_t size;
  const sockaddr_un at = address_of(name, size);
  const int line = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  ucred who{};
  socklen_t who_size = sizeof who;
  char yes = 0;
  const std::uint64_t question[] = {address, length};
  if (::connect(line, reinterpret_cast<const sockaddr*>(&at), size) != 0 ||
      ::getsockopt(line, SOL_SOCKET, SO_PEERCRED, &who, &who_size) != 0 ||
      ::send(line, question, sizeof question, MSG_NOSIGNAL) != sizeof question || ::read(line, &yes, 1) != 1 || !yes)
    who.pid = 0;
  ::close(line);
  return who.pid;
}

State copy(Engine& engine, const Request& request) {
  const auto source = reinterpret_cast<std::uint64_t>(request.source);
  {
    const std::lock_guard lock(engine.mutex);
    if (!engine.holds(source, request.length)) return kFailed;
  }
  const pid_t owner = owner_of(engine.segments[request.segment], request.target, request.length);
  if (fault("fail") || owner == 0) return kFailed;
  const iovec here{request.source, request.length}, there{reinterpret_cast<void*>(request.target), request.length};
  const ssize_t done = request.opcode == 0 ? ::process_vm_readv(owner, &here, 1, &there, 1, 0)
                                           : ::process_vm_writev(owner, &here, 1, &there, 1, 0);
  return done == static_cast<ssize_t>(request.length) ? kCompleted : kFailed;
}

}  // namespace

extern "C" {

Engine* createTransferEngine(const char* metadata, const char*, const char* address, std::uint64_t, int) {
  if (fault("engine") || std::strcmp(metadata, "P2PHANDSHAKE") != 0) return nullptr;
  auto* engine = new Engine;
  engine->name = std::string(address) + ":" + std::to_string(::getpid()) + "." + std::to_string(next_port++);
  socklen_t size;
  const sockaddr_un at = address_of(engine->name, size);
  engine->listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (::bind(engine->listener, reinterpret_cast<const sockaddr*>(&at), size) != 0 ||
      ::listen(engine->listener, 64) != 0)
    std::abort();
  engine->segments.push_back(engine->name);
  engine->answering = std::thread([engine] { answer(*engine); });
  return engine;
}
void destroyTransferEngine(Engine* engine) {
  engine->stopping = true;
  ::shutdown(engine->listener, SHUT_RDWR);
  engine->answering.join();
  ::close(engine->listener);
  if (!engine->memory.empty()) std::abort();  // somebody has forgotten to take it back
  delete engine;
}
int getLocalIpAndPort(Engine* engine, char* out, std::size_t size) {
  std::snprintf(out, size, "%s", engine->name.c_str());
  return 0;
}
void* installTransport(Engine* engine, const char* protocol, void** arguments) {
  const bool rdma = !std::strcmp(protocol, "rdma");
  if (rdma != (arguments != nullptr)) return nullptr;
  if (rdma) std::fprintf(stderr, "devices: %s\n", static_cast<const char*>(arguments[0]));
  return engine;
}
int openSegmentNoCache(Engine* engine, const char* name) {
  if (owner_of(name, 0, 0) == 0) return -1;
  const std::lock_guard lock(engine->mutex);
  for (std::size_t i = 0; i < engine->segments.size(); ++i)
    if (engine->segments[i] == name) return static_cast<int>(i);
  engine->segments.push_back(name);
  return static_cast<int>(engine->segments.size() - 1);
}
int closeSegment(Engine*, int) {
  return 0;
}
int registerLocalMemory(Engine* engine, void* address, std::size_t bytes, const char*, int) {
  if (fault("memory")) return -1;
  const auto start = reinterpret_cast<std::uint64_t>(address);
  const std::lock_guard lock(engine->mutex);
  const auto next = engine->memory.lower_bound(start + bytes);
  if (next != engine->memory.begin() && std::prev(next)->second > start) return -7;
  engine->memory[start] = start + bytes;
  return 0;
}
int unregisterLocalMemory(Engine* engine, void* address) {
  const std::lock_guard lock(engine->mutex);
  return engine->memory.erase(reinterpret_cast<std::uint64_t>(address)) == 1 ? 0 : -1;
}

std::uint64_t allocateBatchID(Engine*, std::size_t size) {
  return reinterpret_cast<std::uint64_t>(new Batch{size, {}, {}});
}
int submitTransfer(Engine* engine, Batch* batch, Request* requests, std::size_t count) {
  if (fault("refuse") || count > batch->size) return -1;
  const std::lock_guard lock(engine->mutex);
  int& under_way = engine->under_way[requests[0].segment];
  if (under_way + static_cast<int>(count) > 1024) std::abort();
  const bool half = fault("half");
  batch->requests.assign(requests, requests + (half ? count / 2 : count));
  batch->ended.assign(batch->requests.size(), false);
  under_way += static_cast<int>(batch->requests.size());
  return half ? -1 : 0;
}
// A request is done when somebody asks for the second time.
int getTransferStatus(Engine* engine, Batch* batch, std::size_t task, Status* status) {
  if (task >= batch->requests.size()) return 1;
  const Request& request = batch->requests[task];
  *status = {kWaiting, 0};
  if (fault("stall")) return 0;
  status->state = copy(*engine, request);
  status->bytes = status->state == kCompleted ? request.length : 0;
  const std::lock_guard lock(engine->mutex);
  if (!batch->ended[task]) --engine->under_way[request.segment];
  batch->ended[task] = true;
  return 0;
}
int freeBatchID(Engine*, Batch* batch) {
  for (const bool ended : batch->ended)
    if (!ended) return 4;
  delete batch;
  return 0;
}

}  // extern "C"
