#include "backends/mooncake/engine.h"

#include <dlfcn.h>

#include "base/env.h"

namespace nixl::core::mooncake {
namespace {

constexpr const char* kLibrary = "libtransfer_engine.so";
constexpr int kMaxGpus = 16, kMaxNumaNodes = 8;  // named in the table of devices; more of either take any device

template <typename F>
bool find(void* library, const char* name, F& into) {
  into = reinterpret_cast<F>(::dlsym(library, name));
  return into != nullptr;
}

Result<Api> open_library() {
  Api api{};
  api.file = env_text("NIXL_MOONCAKE_LIBRARY").value_or(kLibrary);
  void* const library = ::dlopen(api.file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* error = ::dlerror();
    return fail(
        Code::kUnsupported,
        "the Mooncake transfer engine %s cannot be opened where the loader looks (%s); build Mooncake with "
        "-DBUILD_SHARED_LIBS=ON (its Python packages hold no C interface), put its folder on LD_LIBRARY_PATH, or "
        "name the file in NIXL_MOONCAKE_LIBRARY",
        kLibrary, error ? error : api.file.c_str());
  }
  const bool all =
      find(library, "createTransferEngine", api.create) && find(library, "destroyTransferEngine", api.destroy) &&
      find(library, "getLocalIpAndPort", api.local_name) && find(library, "installTransport", api.install) &&
      (find(library, "openSegmentNoCache", api.open_segment) || find(library, "openSegment", api.open_segment)) &&
      find(library, "closeSegment", api.close_segment) && find(library, "registerLocalMemory", api.register_memory) &&
      find(library, "unregisterLocalMemory", api.unregister_memory) &&
      find(library, "allocateBatchID", api.allocate_batch) && find(library, "submitTransfer", api.submit) &&
      find(library, "getTransferStatus", api.status) && find(library, "freeBatchID", api.free_batch);
  if (!all) {
    const char* error = ::dlerror();
    return fail(Code::kUnsupported, "%s has not the C interface of the Mooncake transfer engine: %s", api.file.c_str(),
                error ? error : "a function is missing");
  }
  api.moves_gpu_memory = ::dlsym(library, "cudaMemcpy") || ::dlsym(library, "cuMemcpy");
  return api;
}

// Which devices serve which memory, as installTransport takes it: the same ones for all.
std::string device_table(const std::vector<std::string>& devices) {
  std::string list;
  for (const std::string& device : devices) list += (list.empty() ? "\"" : ", \"") + device + "\"";
  std::string table;
  const auto add = [&](const std::string& place) {
    table += (table.empty() ? "{\"" : ", \"") + place + "\": [[" + list + "], []]";
  };
  for (int node = 0; node < kMaxNumaNodes; ++node) add("cpu:" + std::to_string(node));
  for (int gpu = 0; gpu < kMaxGpus; ++gpu) add("cuda:" + std::to_string(gpu));
  return table + "}";
}

}  // namespace

Result<const Api*> Api::load() {
  static const Result<Api> kApi = open_library();
  if (!kApi) return fail(kApi.error());
  return &*kApi;
}

Result<std::unique_ptr<Engine>> Engine::open(const Api& api, const EngineOptions& options) {
  std::unique_ptr<Engine> engine(new Engine(api));
  const bool rdma = options.protocol == "rdma";
  const bool discover = rdma && options.devices.empty();
  engine->engine_ = api.create("P2PHANDSHAKE", options.address.c_str(), options.address.c_str(), 0, discover);
  if (!engine->engine_)
    return fail(Code::kIo, "createTransferEngine at address %s failed; the engine has written why to stderr",
                options.address.c_str());
  if (!discover) {
    std::string table = device_table(options.devices);
    void* arguments[] = {table.data(), nullptr};
    if (!api.install(engine->engine_, options.protocol.c_str(), rdma ? arguments : nullptr))
      return fail(Code::kIo, "installTransport of '%s' failed; the engine has written why to stderr",
                  options.protocol.c_str());
  }
  char name[256] = {};
  if (const int code = api.local_name(engine->engine_, name, sizeof name); code != 0 || !name[0])
    return fail(Code::kIo, "getLocalIpAndPort answered %d", code);
  engine->name_ = name;
  return engine;
}

Engine::~Engine() {
  if (engine_) api_.destroy(engine_);
}

Result<void> Engine::register_memory(std::uint64_t address, std::uint64_t bytes, int gpu) {
  const std::string location = gpu < 0 ? "*" : "cuda:" + std::to_string(gpu);
  if (const int code = api_.register_memory(engine_, reinterpret_cast<void*>(address), bytes, location.c_str(), 1))
    return fail(Code::kIo, "registerLocalMemory of %llu bytes at 0x%llx (%s) answered %d",
                static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(address), location.c_str(),
                code);
  return {};
}

void Engine::unregister_memory(std::uint64_t address) noexcept {
  (void)api_.unregister_memory(engine_, reinterpret_cast<void*>(address));
}

Result<int> Engine::open_segment(const std::string& name) {
  const int segment = api_.open_segment(engine_, name.c_str());
  if (segment < 0) return fail(Code::kIo, "openSegmentNoCache of %s answered %d", name.c_str(), segment);
  return segment;
}

void Engine::close_segment(int segment) noexcept {
  (void)api_.close_segment(engine_, segment);
}

Result<void> Engine::submit(std::span<EngineRequest> requests, std::uint64_t& batch) {
  batch = api_.allocate_batch(engine_, requests.size());
  if (batch == kNoBatch) return fail(Code::kIo, "allocateBatchID of %zu requests failed", requests.size());
  if (const int code = api_.submit(engine_, batch, requests.data(), requests.size()))
    return fail(Code::kIo, "submitTransfer of %zu requests answered %d", requests.size(), code);
  return {};
}

TaskState Engine::poll(std::uint64_t batch, std::size_t task, std::string& why) noexcept {
  static constexpr const char* kNames[] = {"WAITING",   "PENDING", "INVALID", "CANCELED",
                                           "COMPLETED", "TIMEOUT", "FAILED"};
  EngineStatus status{};
  if (const int code = api_.status(engine_, batch, task, &status)) {
    why = "getTransferStatus answered " + std::to_string(code);
    return TaskState::kFailed;
  }
  if (status.state == 4) return TaskState::kDone;
  if (status.state == 0 || status.state == 1) return TaskState::kRunning;
  why = std::string("the transfer engine reports ") +
        (status.state > 0 && status.state <= 6 ? kNames[status.state] : "an unknown status") + " (" +
        std::to_string(status.state) + ")";
  return TaskState::kFailed;
}

void Engine::free_batch(std::uint64_t batch) noexcept {
  (void)api_.free_batch(engine_, batch);
}

}  // namespace nixl::core::mooncake
