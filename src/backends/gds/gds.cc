#include "backends/gds/gds.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "backends/gds/gpu_queue.h"
#include "base/env.h"
#include "base/log.h"
#include "fileio/engine.h"
#include "fileio/file_table.h"
#include "fileio/request.h"

namespace nixl::core {
namespace {

using gds::Cufile;
using gds::GpuFile;
using gds::GpuQueue;

struct Self final : Connection {};
struct HostMemory final : LocalRegion {};
struct GpuMemory final : LocalRegion {
  const Cufile* cufile = nullptr;
  std::byte* base = nullptr;
  int gpu = 0;
  bool registered = false;
  ~GpuMemory() override {
    if (registered) cufile->deregister_buffer(base);
  }
};
struct OpenFile {
  std::shared_ptr<fileio::File> file;
  std::shared_ptr<GpuFile> gpu_file;
};
struct FileRegion final : LocalRegion {
  OpenFile open;
};
struct FileTarget final : RemoteRegion {
  OpenFile open;
};

class HostTransfer final : public Transfer {
 public:
  HostTransfer(fileio::Engine& engine, std::unique_ptr<fileio::Request> request, std::vector<OpenFile> files)
      : engine_(engine), files_(std::move(files)), request_(std::move(request)) {}
  Result<TransferState> submit(std::optional<std::string_view>) override {
    NIXL_ASSIGN(const auto state, engine_.start(*request_));
    return state == fileio::Engine::State::kDone ? TransferState::kDone : TransferState::kRunning;
  }
  Result<TransferState> poll() override {
    switch (engine_.poll(*request_)) {
      case fileio::Engine::State::kRunning:
        return TransferState::kRunning;
      case fileio::Engine::State::kDone:
        return TransferState::kDone;
      case fileio::Engine::State::kFailed:
        return fail(fileio::Engine::error_of(*request_));
      case fileio::Engine::State::kIdle:
        break;
    }
    return fail(Code::kNotPosted, "the transfer was never submitted");
  }
  bool cancel() noexcept override { return engine_.cancel(*request_); }
  std::string path() const override { return fileio::Engine::path_of(*request_); }

 private:
  fileio::Engine& engine_;
  std::vector<OpenFile> files_;
  std::unique_ptr<fileio::Request> request_;
};

class GpuTransfer final : public Transfer {
 public:
  GpuTransfer(GpuQueue& queue, std::unique_ptr<gds::GpuRequest> request, std::string path)
      : queue_(queue), request_(std::move(request)), path_(std::move(path)) {}
  Result<TransferState> submit(std::optional<std::string_view>) override {
    NIXL_ASSIGN(const auto state, queue_.start(*request_));
    return state == GpuQueue::State::kDone ? TransferState::kDone : TransferState::kRunning;
  }
  Result<TransferState> poll() override {
    switch (GpuQueue::state_of(*request_)) {
      case GpuQueue::State::kRunning:
        return TransferState::kRunning;
      case GpuQueue::State::kDone:
        return TransferState::kDone;
      case GpuQueue::State::kFailed:
        return fail(GpuQueue::error_of(*request_));
      case GpuQueue::State::kIdle:
        break;
    }
    return fail(Code::kNotPosted, "the transfer was never submitted");
  }
  bool cancel() noexcept override { return queue_.cancel(*request_); }
  std::string path() const override { return path_; }

 private:
  GpuQueue& queue_;
  std::unique_ptr<gds::GpuRequest> request_;
  std::string path_;
};

class Gds final : public Backend, private MemoryQuery {
 public:
  Gds(std::string name, std::string mode, BackendConfig config, const Cufile& cufile,
      std::unique_ptr<fileio::Engine> engine, std::unique_ptr<GpuQueue> queue)
      : name_(std::move(name)),
        mode_(std::move(mode)),
        config_(std::move(config)),
        cufile_(cufile),
        engine_(std::move(engine)),
        queue_(std::move(queue)) {}

  const Abilities& abilities() const noexcept override {
    static const Abilities kAbilities{{MemKind::kDram, MemKind::kVram}, {MemKind::kFile}, false, true, true};
    return kAbilities;
  }

  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) override {
    if (region.kind == MemKind::kDram) return std::make_unique<HostMemory>();
    if (region.kind == MemKind::kVram) return add_gpu_memory(region);
    if (region.kind != MemKind::kFile)
      return fail(Code::kInvalidArgument, "%s takes DRAM_SEG, VRAM_SEG and FILE_SEG, not %s", name_.c_str(),
                  nixl::core::name(region.kind));
    auto added = std::make_unique<FileRegion>();
    NIXL_ASSIGN(added->open.file, files_.add(region.device, region.meta));
    NIXL_ASSIGN(added->open.gpu_file, gpu_file(added->open.file));
    return added;
  }
  Result<std::unique_ptr<RemoteRegion>> loopback_region(Connection&, const Region& region,
                                                        LocalRegion& local) override {
    if (region.kind != MemKind::kFile) return std::make_unique<RemoteRegion>();
    auto target = std::make_unique<FileTarget>();
    target->open = static_cast<FileRegion&>(local).open;
    return target;
  }
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view) override {
    if (peer.name != config_.self.name)
      return fail(Code::kInvalidArgument, "%s serves its own agent '%s' only, not '%s'", name_.c_str(),
                  config_.self.name.c_str(), peer.name.c_str());
    return std::make_unique<Self>();
  }

  Result<std::unique_ptr<Transfer>> prepare(Plan plan) override {
    if (plan.remote_kind != MemKind::kFile || is_storage(plan.local_kind))
      return fail(Code::kInvalidArgument,
                  "%s moves between DRAM_SEG or VRAM_SEG (local) and FILE_SEG (remote), not %s and %s", name_.c_str(),
                  nixl::core::name(plan.local_kind), nixl::core::name(plan.remote_kind));
    return plan.local_kind == MemKind::kVram ? prepare_gpu(plan) : prepare_host(plan);
  }

  bool progress() noexcept override { return engine_->progress() | queue_->drain(); }
  MemoryQuery* memory_query() noexcept override { return this; }
  Result<std::vector<std::optional<Params>>> query(std::span<const Region> regions) override {
    std::vector<std::optional<Params>> answers;
    for (const Region& region : regions) {
      NIXL_ASSIGN(const auto mode, fileio::parse_path_mode(region.meta));
      NIXL_ASSIGN(const auto info, fileio::file_info(mode ? mode->path : region.meta));
      answers.push_back(std::nullopt);
      if (info)
        answers.back() = Params{{"size", std::to_string(info->size)},
                                {"mode", std::to_string(info->mode)},
                                {"mtime", std::to_string(info->mtime)}};
    }
    return answers;
  }

 private:
  Result<std::unique_ptr<LocalRegion>> add_gpu_memory(const Region& region) {
    auto added = std::make_unique<GpuMemory>();
    added->cufile = &cufile_;
    added->base = reinterpret_cast<std::byte*>(region.address);
    added->gpu = static_cast<int>(region.device);
    // Registered memory is quicker, but not all memory can be (compatibility mode, overlaps): cuFile then takes it as
    // it is.
    const gds::CufileError error = cufile_.register_buffer(added->base, region.length, 0);
    added->registered = error.error == 0;
    if (!added->registered)
      NIXL_DEBUG("%s: memory stays unregistered: %s", name_.c_str(), Cufile::text_of(error).c_str());
    return added;
  }
  // One handle a file: cuFile refuses a second of the same descriptor.
  Result<std::shared_ptr<GpuFile>> gpu_file(const std::shared_ptr<fileio::File>& file) {
    const std::lock_guard lock(mutex_);
    if (auto known = gpu_files_[file.get()].lock()) return known;
    NIXL_ASSIGN(std::shared_ptr<GpuFile> opened, GpuFile::open(cufile_, file));
    gpu_files_[file.get()] = opened;
    return opened;
  }

  template <typename F>
  static void each_block(const Plan& plan, F body) {
    for (std::size_t row = 0; row < plan.num_rows(); ++row) {
      const OpenFile& open = static_cast<FileTarget*>(plan.remote_regions[plan.remote_region[row]])->open;
      const std::uint64_t count = plan.has_runs() ? plan.count[row] : 1;
      for (std::uint64_t block = 0; block < count; ++block)
        body(row, open, plan.local_address[row] + (block ? block * plan.local_stride[row] : 0),
             plan.remote_address[row] + (block ? block * plan.remote_stride[row] : 0), plan.length[row]);
    }
  }
  Result<std::unique_ptr<Transfer>> prepare_host(const Plan& plan) {
    std::vector<fileio::Piece> pieces;
    pieces.reserve(plan.num_blocks);
    each_block(plan,
               [&](std::size_t, const OpenFile& open, std::uint64_t memory, std::uint64_t offset, std::uint64_t bytes) {
                 pieces.push_back({open.file.get(), offset, reinterpret_cast<std::byte*>(memory), bytes, nullptr});
               });
    std::vector<OpenFile> files;
    for (RemoteRegion* region : plan.remote_regions) files.push_back(static_cast<FileTarget*>(region)->open);
    NIXL_ASSIGN(auto request, engine_->prepare(plan.op == Op::kWrite, pieces));
    return std::make_unique<HostTransfer>(*engine_, std::move(request), std::move(files));
  }
  Result<std::unique_ptr<Transfer>> prepare_gpu(const Plan& plan) {
    std::vector<gds::GpuPiece> pieces;
    pieces.reserve(plan.num_blocks);
    each_block(plan, [&](std::size_t row, const OpenFile& open, std::uint64_t memory, std::uint64_t offset,
                         std::uint64_t bytes) {
      const auto& region = static_cast<GpuMemory&>(*plan.local_regions[plan.local_region[row]]);
      auto* address = reinterpret_cast<std::byte*>(memory);
      std::byte* base = region.registered ? region.base : address;
      pieces.push_back({open.gpu_file, offset, base, static_cast<std::uint64_t>(address - base), bytes, region.gpu});
    });
    NIXL_ASSIGN(auto request, queue_->prepare(plan.op == Op::kWrite, std::move(pieces)));
    const std::string path = request->batched ? "cufile_batch" : "cufile";
    return std::make_unique<GpuTransfer>(*queue_, std::move(request),
                                         mode_ == "compatibility" ? "staged+" + path : path);
  }

  const std::string name_, mode_;
  const BackendConfig config_;
  const Cufile& cufile_;
  fileio::FileTable files_;
  std::mutex mutex_;
  std::map<const fileio::File*, std::weak_ptr<GpuFile>> gpu_files_;
  std::unique_ptr<fileio::Engine> engine_;
  std::unique_ptr<GpuQueue> queue_;
};

Result<std::uint64_t> number(const std::string& backend, const Params& params, const char* key,
                             std::uint64_t fallback) {
  const auto found = params.find(key);
  if (found == params.end() || found->second.empty()) return fallback;
  const auto value = parse_int(found->second);
  if (!value || *value < 1)
    return fail(Code::kInvalidArgument, "%s parameter %s is '%s': a number >= 1 is needed", backend.c_str(), key,
                found->second.c_str());
  return static_cast<std::uint64_t>(*value);
}

Result<std::unique_ptr<Backend>> open_either(const char* name, BackendConfig config,
                                             const gds::GpuQueueConfig& queue_config) {
  NIXL_ASSIGN(const Cufile* cufile, Cufile::load());
  NIXL_ASSIGN(std::string mode, cufile->start());
  if (mode == "compatibility")
    NIXL_WARN("%s: cuFile's driver nvidia-fs is not there, so files go through host memory (compatibility mode)", name);
  fileio::EngineConfig engine_config;
  engine_config.num_threads = queue_config.num_threads;
  NIXL_ASSIGN(auto engine, fileio::Engine::open(engine_config));
  Fd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event) return fail(errno_error("eventfd", errno));
  auto queue = std::make_unique<GpuQueue>(*cufile, queue_config, std::move(event));
  return std::make_unique<Gds>(name, std::move(mode), std::move(config), *cufile, std::move(engine), std::move(queue));
}

unsigned half_the_cores() {
  return static_cast<unsigned>(std::max(1l, ::sysconf(_SC_NPROCESSORS_ONLN) / 2));
}

Result<std::unique_ptr<Backend>> open_gds(BackendConfig config) {
  gds::GpuQueueConfig queue;
  NIXL_ASSIGN(const std::uint64_t pool, number("GDS", config.params, "batch_pool_size", 16));
  NIXL_ASSIGN(const std::uint64_t limit, number("GDS", config.params, "batch_limit", 128));
  NIXL_ASSIGN(queue.max_piece_bytes, number("GDS", config.params, "max_request_size", 16 << 20));
  queue.batch_pool_size = static_cast<unsigned>(std::min<std::uint64_t>(pool, 1024));
  queue.batch_limit = static_cast<unsigned>(std::min<std::uint64_t>(limit, 65536));
  queue.num_threads = std::min(queue.batch_pool_size, std::max(2u, half_the_cores()));
  return open_either("GDS", std::move(config), queue);
}
Result<std::unique_ptr<Backend>> open_gds_mt(BackendConfig config) {
  gds::GpuQueueConfig queue;
  NIXL_ASSIGN(const std::uint64_t threads, number("GDS_MT", config.params, "thread_count", half_the_cores()));
  queue.num_threads = static_cast<unsigned>(std::min<std::uint64_t>(threads, 256));
  return open_either("GDS_MT", std::move(config), queue);
}

Probe probe_gds() {
  const auto loaded = Cufile::load();
  if (!loaded) return {false, loaded.error().reason, {}};
  if (!env_text("NIXL_CUDA_LIBRARY") && ::access("/dev/nvidiactl", F_OK) != 0)
    return {false, "no NVIDIA GPU: there is no device node /dev/nvidiactl", {}};
  return {true, "", {MemKind::kDram, MemKind::kVram, MemKind::kFile}};
}

}  // namespace

std::span<const BackendEntry> backends_of_gds() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry gds;
    gds.name = "GDS";
    gds.params = {{"batch_limit", "128"}, {"batch_pool_size", "16"}, {"max_request_size", "16777216"}};
    gds.kinds = {MemKind::kDram, MemKind::kVram, MemKind::kFile};
    gds.local = true;
    gds.excludes = {"GDS_MT"};
    gds.probe = probe_gds;
    gds.open = open_gds;
    BackendEntry threads = gds;
    threads.name = "GDS_MT";
    threads.params = {{"thread_count", std::to_string(half_the_cores())}};
    threads.threads_param = "thread_count";
    threads.excludes = {"GDS"};
    threads.open = open_gds_mt;
    return std::vector<BackendEntry>{gds, threads};
  }();
  return kEntries;
}

}  // namespace nixl::core
