#include "backends/hf3fs/hf3fs.h"

#include <algorithm>
#include <filesystem>
#include <map>
#include <mutex>
#include <vector>

#include "backends/hf3fs/usrbio.h"
#include "backends/storage/file_query.h"
#include "backends/storage/parameters.h"
#include "backends/storage/storage_backend.h"
#include "fileio/engine.h"
#include "fileio/file_table.h"
#include "fileio/request.h"

namespace nixl::core {
namespace {

namespace fs = std::filesystem;
using fileio::Engine;
using FilePlace = std::shared_ptr<hf3fs::RegisteredFile>;

class Hf3fs final : public StorageBackend<FilePlace> {
 public:
  Hf3fs(BackendConfig config, const hf3fs::Usrbio& api, std::string mount_point, std::unique_ptr<Engine> engine)
      : StorageBackend("HF3FS", std::move(config), MemKind::kFile),
        api_(api),
        mount_point_(std::move(mount_point)),
        engine_(std::move(engine)) {}

  bool progress() noexcept override { return engine_->progress(); }
  MemoryQuery* memory_query() noexcept override { return &query_; }

 private:
  Result<FilePlace> open_place(const Region& region) override {
    NIXL_ASSIGN(const auto mode, fileio::parse_path_mode(region.meta));
    if (mode) NIXL_TRY(check_inside(mode->path));
    NIXL_ASSIGN(std::shared_ptr<fileio::File> file, files_.add(region.device, region.meta));
    if (!mode) NIXL_TRY(check_inside("/proc/self/fd/" + std::to_string(file->fd())));
    const std::lock_guard lock(mutex_);
    if (const auto known = registered_.find(file.get()); known != registered_.end())
      if (FilePlace place = known->second.lock()) return place;
    NIXL_ASSIGN(FilePlace place, hf3fs::RegisteredFile::open(api_, file));
    std::erase_if(registered_, [](const auto& entry) { return entry.second.expired(); });
    registered_[file.get()] = place;
    return place;
  }
  Result<void> check_inside(const std::string& path) const {
    std::error_code error;
    const fs::path real = fs::weakly_canonical(path, error);
    const fs::path mount(mount_point_);
    if (!error && std::mismatch(mount.begin(), mount.end(), real.begin(), real.end()).first == mount.end()) return {};
    return fail(Code::kInvalidArgument, "%s is not inside %s, where 3FS is mounted", real.c_str(),
                mount_point_.c_str());
  }

  Result<std::unique_ptr<Transfer>> prepare_transfer(const Plan& plan) override {
    auto files = places_of(plan);
    std::vector<fileio::Piece> pieces;
    pieces.reserve(plan.num_blocks);
    NIXL_TRY(each_block(plan, [&](const Block& block) -> Result<void> {
      pieces.push_back({&files[block.remote]->file(), block.offset, block.memory, block.bytes, block.copier});
      return {};
    }));
    NIXL_ASSIGN(auto request, engine_->prepare(plan.op == Op::kWrite, pieces));
    std::string path = Engine::path_of(*request);
    return make_transfer(*engine_, std::move(request), std::move(files), std::move(path));
  }

  const hf3fs::Usrbio& api_;
  const std::string mount_point_;  // canonical
  FileQuery query_;
  fileio::FileTable files_;
  std::mutex mutex_;
  std::map<const fileio::File*, std::weak_ptr<hf3fs::RegisteredFile>> registered_;
  std::unique_ptr<Engine> engine_;
};

Result<std::unique_ptr<Backend>> open_hf3fs(BackendConfig config) {
  const Parameters params("HF3FS", config.params);
  const std::string memory = params.text("mem_config");
  if (memory == "dram_zc")
    return fail(Code::kUnsupported,
                "HF3FS parameter mem_config is 'dram_zc': only memory that 3FS itself has allocated could go without a "
                "copy, and this backend takes any; use auto or dram");
  if (!memory.empty() && memory != "auto" && memory != "dram")
    return fail(Code::kInvalidArgument, "HF3FS parameter mem_config is '%s': auto, dram or dram_zc is needed",
                memory.c_str());
  NIXL_ASSIGN(const std::int64_t pool, params.clamped("iopool_size", 64, 1, 1 << 20));
  NIXL_ASSIGN(const hf3fs::Usrbio* api, hf3fs::Usrbio::load());
  std::string wanted = params.text("mount_point");
  if (wanted.empty()) wanted = "/mnt/3fs/";
  auto mount = api->mount_of(wanted);
  if (!mount) return fail(within("HF3FS parameter mount_point", std::move(mount).error()));
  NIXL_ASSIGN(auto rings, hf3fs::open_usrbio_queue(*api, *mount, static_cast<std::uint32_t>(pool)));
  NIXL_ASSIGN(auto threads, fileio::open_threads(1024, 2, [] {}));  // copies of GPU memory
  std::error_code error;
  const fs::path real = fs::canonical(*mount, error);
  return std::make_unique<Hf3fs>(std::move(config), *api, error ? *mount : real.string(),
                                 Engine::with_queues(std::move(rings), std::move(threads), true));
}

Probe probe_hf3fs() {
  if (const auto api = hf3fs::Usrbio::load(); !api) return {false, api.error().reason, {}};
  return {true, "", staged_memory_kinds() | KindSet{MemKind::kFile}};
}

}  // namespace

std::span<const BackendEntry> backends_of_hf3fs() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "HF3FS";
    entry.params = {{"mount_point", "/mnt/3fs/"}, {"mem_config", "auto"}, {"iopool_size", "64"}};
    entry.list_params = false;
    entry.kinds = {MemKind::kDram, MemKind::kVram, MemKind::kFile};
    entry.local = true;
    entry.probe = probe_hf3fs;
    entry.open = open_hf3fs;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
