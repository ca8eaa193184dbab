// The Mooncake transfer engine of the public Python package, under its C interface: the package holds the engine inside a Python module,
// which exports the C++ class but not the C functions. Calls are by the class's symbols, so this fits the version it was written for:
// mooncake-transfer-engine-non-cuda 0.3.13.post1. NIXL_TEST_MOONCAKE_MODULE names its engine.so; outside of Python, NIXL_TEST_LIBPYTHON
// names the library that the module needs.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

namespace {

struct Status {  // returned through memory, as the class's own
  std::uint16_t code;
  char rest[62];
  Status(const Status&) = delete;
  ~Status() {}
};
struct Request {
  int opcode;
  void* source;
  std::uint64_t segment, target;
  std::size_t length;
  int retries;
  std::uint64_t more;
};
static_assert(sizeof(Request) == 56);
struct CRequest {
  int opcode;
  void* source;
  std::int32_t segment;
  std::uint32_t file;
  std::uint64_t target, length;
};
struct Progress {
  int state;
  std::size_t bytes;
};
using Text = std::string;

constexpr std::size_t kRoomForObject = 4096;

void* module() {
  static void* const opened = [] {
    if (!::dlsym(RTLD_DEFAULT, "Py_Initialize")) ::dlopen(std::getenv("NIXL_TEST_LIBPYTHON"), RTLD_NOW | RTLD_GLOBAL);
    void* library = ::dlopen(std::getenv("NIXL_TEST_MOONCAKE_MODULE"), RTLD_LAZY | RTLD_LOCAL);
    if (!library) {
      std::fprintf(stderr, "%s\n", ::dlerror());
      std::abort();
    }
    return library;
  }();
  return opened;
}

// A member of mooncake::TransferEngine; `name` as the linker knows it, after the class.
template <typename F>
F* member(const char* name) {
  void* const found = ::dlsym(module(), (std::string("_ZN8mooncake14TransferEngine") + name).c_str());
  if (!found) {
    std::fprintf(stderr, "the package's engine has no %s\n", name);
    std::abort();
  }
  return reinterpret_cast<F*>(found);
}
#define TEXT_ "RKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"

}  // namespace

extern "C" {

void* createTransferEngine(const char* metadata, const char* name, const char* address, std::uint64_t port,
                           int discover) {
  static const auto construct = member<void(void*, bool)>("C1Eb");
  static const auto init =
      member<int(void*, const Text&, const Text&, const Text&, std::uint64_t)>("4initE" TEXT_ "S8_S8_m");
  void* engine = std::calloc(1, kRoomForObject);
  construct(engine, discover != 0);
  return init(engine, metadata, name, address, port) == 0 ? engine : nullptr;
}
void destroyTransferEngine(void* engine) {
  member<void(void*)>("D1Ev")(engine);
  std::free(engine);
}
void* installTransport(void* engine, const char* protocol, void** arguments) {
  return member<void*(void*, const Text&, void**)>("16installTransportE" TEXT_ "PPv")(engine, protocol, arguments);
}
int getLocalIpAndPort(void* engine, char* out, std::size_t size) {
  std::snprintf(out, size, "%s", member<Text(void*)>("17getLocalIpAndPortB5cxx11Ev")(engine).c_str());
  return 0;
}
int openSegmentNoCache(void* engine, const char* name) {
  static const auto sync = member<int(void*, const Text&)>("16syncSegmentCacheE" TEXT_);
  static const auto open = member<std::uint64_t(void*, const Text&)>("11openSegmentE" TEXT_);
  if (const int code = sync(engine, name)) return code;
  return static_cast<int>(open(engine, name));
}
int closeSegment(void* engine, int segment) {
  return member<int(void*, std::uint64_t)>("12closeSegmentEm")(engine, static_cast<std::uint64_t>(segment));
}
int registerLocalMemory(void* engine, void* address, std::size_t bytes, const char* location, int remote) {
  static const auto add =
      member<int(void*, void*, std::size_t, const Text&, bool, bool)>("19registerLocalMemoryEPvm" TEXT_ "bb");
  return add(engine, address, bytes, location, remote != 0, true);
}
int unregisterLocalMemory(void* engine, void* address) {
  return member<int(void*, void*, bool)>("21unregisterLocalMemoryEPvb")(engine, address, true);
}

std::uint64_t allocateBatchID(void* engine, std::size_t size) {
  return member<std::uint64_t(void*, std::size_t)>("15allocateBatchIDEm")(engine, size);
}
int submitTransfer(void* engine, std::uint64_t batch, const CRequest* requests, std::size_t count) {
  static const auto submit = member<Status(void*, std::uint64_t, const std::vector<Request>&)>(
      "14submitTransferEmRKSt6vectorINS_9Transport15TransferRequestESaIS3_EE");
  std::vector<Request> list;
  for (const CRequest* at = requests; at < requests + count; ++at)
    list.push_back({at->opcode, at->source, static_cast<std::uint64_t>(at->segment), at->target, at->length, 0, 0});
  return submit(engine, batch, list).code;
}
int getTransferStatus(void* engine, std::uint64_t batch, std::size_t task, Progress* progress) {
  static const auto status = member<Status(void*, std::uint64_t, std::size_t, Progress&)>(
      "17getTransferStatusEmmRNS_9Transport14TransferStatusE");
  return status(engine, batch, task, *progress).code;
}
int freeBatchID(void* engine, std::uint64_t batch) {
  return member<Status(void*, std::uint64_t)>("11freeBatchIDEm")(engine, batch).code;
}

}  // extern "C"
