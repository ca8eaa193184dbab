#include "backends/gds/gds.h"

#include <sys/eventfd.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "backends/gds/gpu_queue.h"
#include "backends/storage/file_query.h"
#include "backends/storage/parameters.h"
#include "backends/storage/storage_backend.h"
#include "base/log.h"
#include "fileio/engine.h"
#include "fileio/file_table.h"
#include "fileio/request.h"

namespace nixl::core {
namespace {

using gds::Cufile;
using gds::GpuFile;
using gds::GpuQueue;

struct OpenFile {
  std::shared_ptr<fileio::File> file;
  std::shared_ptr<GpuFile> gpu_file;  // null: cuFile refused it, so GPU memory goes through our own host buffers
};

class Gds final : public StorageBackend<OpenFile> {
 public:
  Gds(std::string name, std::string mode, BackendConfig config, const Cufile& cufile,
      std::unique_ptr<fileio::Engine> engine, std::unique_ptr<GpuQueue> queue)
      : StorageBackend(std::move(name), std::move(config), MemKind::kFile),
        mode_(std::move(mode)),
        cufile_(cufile),
        engine_(std::move(engine)),
        queue_(std::move(queue)) {}

  bool progress() noexcept override { return engine_->progress() | queue_->drain(); }
  MemoryQuery* memory_query() noexcept override { return &query_; }

 private:
  struct GpuMemory final : Memory {
    const Cufile* cufile = nullptr;
    std::byte* base = nullptr;
    int gpu = 0;
    bool registered = false;
    ~GpuMemory() override {
      if (registered) cufile->deregister_buffer(base);
    }
  };

  Result<OpenFile> open_place(const Region& region) override {
    OpenFile open;
    NIXL_ASSIGN(open.file, files_.add(region.device, region.meta));
    open.gpu_file = gpu_file(open.file);
    return open;
  }
  Result<std::unique_ptr<LocalRegion>> add_vram(const Region& region) override {
    auto added = std::make_unique<GpuMemory>();
    NIXL_ASSIGN(added->copier, vram_copier(region));
    added->cufile = &cufile_;
    added->base = reinterpret_cast<std::byte*>(region.address);
    added->gpu = static_cast<int>(region.device);
    // Registered memory is quicker, but not all memory can be (compatibility mode, overlaps): cuFile then takes it as
    // it is.
    const gds::CufileError error = cufile_.register_buffer(added->base, region.length, 0);
    added->registered = error.error == 0;
    if (!added->registered)
      NIXL_DEBUG("%s: memory stays unregistered: %s", name().c_str(), Cufile::text_of(error).c_str());
    return added;
  }
  // One handle a file: cuFile refuses a second of the same descriptor.
  std::shared_ptr<GpuFile> gpu_file(const std::shared_ptr<fileio::File>& file) {
    const std::lock_guard lock(mutex_);
    if (auto known = gpu_files_[file.get()].lock()) return known;
    auto opened = GpuFile::open(cufile_, file);
    if (!opened) {
      NIXL_WARN("%s: GPU memory reaches this file through host buffers of ours: %s", name().c_str(),
                opened.error().reason.c_str());
      return nullptr;
    }
    std::shared_ptr<GpuFile> shared = std::move(*opened);
    gpu_files_[file.get()] = shared;
    return shared;
  }

  Result<std::unique_ptr<Transfer>> prepare_transfer(const Plan& plan) override {
    auto files = places_of(plan);
    const bool all = std::all_of(files.begin(), files.end(), [](const OpenFile& open) { return open.gpu_file; });
    return plan.local_kind == MemKind::kVram && all ? prepare_gpu(plan, files) : prepare_host(plan, std::move(files));
  }
  Result<std::unique_ptr<Transfer>> prepare_host(const Plan& plan, std::vector<OpenFile> files) {
    std::vector<fileio::Piece> pieces;
    pieces.reserve(plan.num_blocks);
    NIXL_TRY(each_block(plan, [&](const Block& block) -> Result<void> {
      pieces.push_back({files[block.remote].file.get(), block.offset, block.memory, block.bytes, block.copier});
      return {};
    }));
    NIXL_ASSIGN(auto request, engine_->prepare(plan.op == Op::kWrite, pieces));
    std::string path = fileio::Engine::path_of(*request);
    return make_transfer(*engine_, std::move(request), std::move(files), std::move(path));
  }
  Result<std::unique_ptr<Transfer>> prepare_gpu(const Plan& plan, const std::vector<OpenFile>& files) {
    std::vector<gds::GpuPiece> pieces;
    pieces.reserve(plan.num_blocks);
    NIXL_TRY(each_block(plan, [&](const Block& block) -> Result<void> {
      const auto& region = static_cast<GpuMemory&>(*plan.local_regions[block.local]);
      std::byte* base = region.registered ? region.base : block.memory;
      pieces.push_back({files[block.remote].gpu_file, block.offset, base,
                        static_cast<std::uint64_t>(block.memory - base), block.bytes, region.gpu});
      return {};
    }));
    NIXL_ASSIGN(auto request, queue_->prepare(plan.op == Op::kWrite, std::move(pieces)));
    std::string path = request->batched ? "cufile_batch" : "cufile";
    if (mode_ == "compatibility") path = "staged+" + path;
    return make_transfer(*queue_, std::move(request), std::vector<OpenFile>(), std::move(path));
  }

  const std::string mode_;
  const Cufile& cufile_;
  FileQuery query_;
  fileio::FileTable files_;
  std::mutex mutex_;
  std::map<const fileio::File*, std::weak_ptr<GpuFile>> gpu_files_;
  std::unique_ptr<fileio::Engine> engine_;
  std::unique_ptr<GpuQueue> queue_;
};

Result<std::unique_ptr<Backend>> open_either(const char* name, BackendConfig config,
                                             const gds::GpuQueueConfig& queue_config) {
  NIXL_ASSIGN(const Cufile* cufile, Cufile::load());
  NIXL_ASSIGN(std::string mode, cufile->start());
  if (mode == "compatibility") NIXL_WARN("%s: %s", name, Cufile::remark().c_str());
  fileio::EngineConfig engine_config;
  engine_config.num_threads = queue_config.num_threads;
  NIXL_ASSIGN(auto engine, fileio::Engine::open(engine_config));
  Fd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event) return fail(errno_error("eventfd", errno));
  auto queue = std::make_unique<GpuQueue>(*cufile, queue_config, std::move(event));
  return std::make_unique<Gds>(name, std::move(mode), std::move(config), *cufile, std::move(engine), std::move(queue));
}

Result<std::unique_ptr<Backend>> open_gds(BackendConfig config) {
  gds::GpuQueueConfig queue;
  const Parameters params("GDS", config.params);
  NIXL_ASSIGN(const std::int64_t pool, params.number("batch_pool_size", 16, 1));
  NIXL_ASSIGN(const std::int64_t limit, params.number("batch_limit", 128, 1));
  NIXL_ASSIGN(const std::int64_t most, params.number("max_request_size", 16 << 20, 1));
  queue.max_piece_bytes = static_cast<std::uint64_t>(most);
  queue.batch_pool_size = static_cast<unsigned>(std::min<std::int64_t>(pool, 1024));
  queue.batch_limit = static_cast<unsigned>(std::min<std::int64_t>(limit, 65536));
  queue.num_threads = std::min(queue.batch_pool_size, std::max(2u, half_the_cores()));
  return open_either("GDS", std::move(config), queue);
}
Result<std::unique_ptr<Backend>> open_gds_mt(BackendConfig config) {
  gds::GpuQueueConfig queue;
  const Parameters params("GDS_MT", config.params);
  NIXL_ASSIGN(const std::int64_t threads, params.number("thread_count", half_the_cores(), 1));
  queue.num_threads = static_cast<unsigned>(std::min<std::int64_t>(threads, 256));
  return open_either("GDS_MT", std::move(config), queue);
}

Probe probe_gds() {
  const auto loaded = Cufile::load();
  if (!loaded) return {false, loaded.error().reason, {}};
  if (auto gpu = GpuDriver::probe(); !gpu) return {false, gpu.error().reason, {}};
  return {true, Cufile::remark(), {MemKind::kDram, MemKind::kVram, MemKind::kFile}};
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
