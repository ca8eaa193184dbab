// Engine: what is used of the Mooncake transfer engine through its C interface (libtransfer_engine.so), opened at run time. Structs are
// laid out as in its C header (transfer_engine_c.h). All of it may be called from any thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/result.h"

namespace nixl::core::mooncake {

struct EngineRequest {  // one contiguous copy between our memory and that of a segment, which is the memory of one peer
  int opcode;           // 0 read, 1 write
  void* source;
  std::int32_t segment;
  std::uint32_t file;  // 0: memory
  std::uint64_t target;
  std::uint64_t length;
};
static_assert(sizeof(EngineRequest) == 40);

struct EngineStatus {
  int state;
  std::uint64_t bytes;
};

struct Api {
  void* (*create)(const char* metadata, const char* name, const char* address, std::uint64_t port, int discover);
  void (*destroy)(void* engine);
  int (*local_name)(void* engine, char* out, std::size_t size);
  void* (*install)(void* engine, const char* protocol, void** arguments);
  int (*open_segment)(void* engine, const char* name);
  int (*close_segment)(void* engine, int segment);
  int (*register_memory)(void* engine, void* address, std::size_t bytes, const char* location, int remote);
  int (*unregister_memory)(void* engine, void* address);
  std::uint64_t (*allocate_batch)(void* engine, std::size_t size);
  int (*submit)(void* engine, std::uint64_t batch, EngineRequest* requests, std::size_t count);
  int (*status)(void* engine, std::uint64_t batch, std::size_t task, EngineStatus* status);
  int (*free_batch)(void* engine, std::uint64_t batch);
  bool moves_gpu_memory;  // built with CUDA
  std::string file;

  // libtransfer_engine.so, or what NIXL_MOONCAKE_LIBRARY names; opened once a process. kUnsupported with what was looked for and the
  // loader's words.
  static Result<const Api*> load();
};

struct EngineOptions {
  std::string protocol;              // "tcp" or "rdma"
  std::string address;               // own, numeric
  std::vector<std::string> devices;  // RDMA devices; empty: all
};

enum class TaskState { kRunning, kDone, kFailed };

class Engine {
 public:
  static Result<std::unique_ptr<Engine>> open(const Api& api, const EngineOptions& options);
  ~Engine();  // waits for the engine's threads
  Engine(const Engine&) = delete;

  const std::string& name() const noexcept { return name_; }  // "address:port": by this peers open our segment

  // `gpu` < 0: host memory. Pieces must not overlap what is registered.
  Result<void> register_memory(std::uint64_t address, std::uint64_t bytes, int gpu);
  void unregister_memory(std::uint64_t address) noexcept;

  // Asks the peer for what it has registered by now. Blocks for a round trip to the peer.
  Result<int> open_segment(const std::string& name);
  void close_segment(int segment) noexcept;

  // Starts the requests as one batch. On failure some may have been started all the same: `batch` is set as soon as there is one,
  // and must be polled to its end and freed like that of a success.
  Result<void> submit(std::span<EngineRequest> requests, std::uint64_t& batch);
  TaskState poll(std::uint64_t batch, std::size_t task, std::string& why) noexcept;
  void free_batch(std::uint64_t batch) noexcept;

  static constexpr std::uint64_t kNoBatch = ~std::uint64_t{0};

 private:
  explicit Engine(const Api& api) : api_(api) {}
  const Api& api_;
  void* engine_ = nullptr;
  std::string name_;
};

}  // namespace nixl::core::mooncake
