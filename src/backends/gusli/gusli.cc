#include "backends/gusli/gusli.h"

#include <algorithm>

#include "backends/gusli/volumes.h"
#include "backends/storage/parameters.h"
#include "backends/storage/storage_backend.h"
#include "fileio/engine.h"
#include "fileio/request.h"

namespace nixl::core {
namespace {

using fileio::Engine;
using gusli::Volume;
using VolumePlace = std::shared_ptr<Volume>;
using Volumes = std::map<std::uint64_t, VolumePlace>;

class Gusli final : public StorageBackend<VolumePlace> {
 public:
  Gusli(BackendConfig config, Volumes volumes, std::unique_ptr<Engine> engine)
      : StorageBackend("GUSLI", std::move(config), MemKind::kBlock),
        volumes_(std::move(volumes)),
        engine_(std::move(engine)) {}

  bool progress() noexcept override { return engine_->progress(); }
  int event_fd() const noexcept override { return engine_->event_fd(); }
  bool arm() noexcept override { return engine_->arm(); }

 private:
  Result<VolumePlace> open_place(const Region& region) override {
    const auto found = volumes_.find(region.device);
    if (found != volumes_.end()) return found->second;
    std::string known;
    for (const auto& [id, volume] : volumes_) known += (known.empty() ? "" : ", ") + std::to_string(id);
    return fail(Code::kInvalidArgument, "GUSLI has no volume %llu; config_file names: %s",
                static_cast<unsigned long long>(region.device), known.empty() ? "none" : known.c_str());
  }

  // One scatter-gather I/O, which "-sgl" asks for, is what neighbours become in any case.
  Result<std::unique_ptr<Transfer>> prepare_transfer(const Plan& plan) override {
    auto volumes = places_of(plan);
    std::vector<std::uint64_t> sizes;
    for (const VolumePlace& volume : volumes) {
      if (plan.op == Op::kWrite && !volume->writable)
        return fail(Code::kInvalidArgument,
                    "GUSLI volume %llu (%s) is for reading only: its access is R in config_file",
                    static_cast<unsigned long long>(volume->id), volume->path.c_str());
      NIXL_ASSIGN(const std::uint64_t size, volume->size());
      sizes.push_back(size);
    }
    std::vector<fileio::Piece> pieces;
    pieces.reserve(plan.num_blocks);
    NIXL_TRY(each_block(plan, [&](const Block& block) -> Result<void> {
      const Volume& volume = *volumes[block.remote];
      NIXL_TRY(check(volume, sizes[block.remote], block.offset, block.bytes));
      pieces.push_back({volume.file.get(), block.offset, block.memory, block.bytes, block.copier});
      return {};
    }));
    NIXL_ASSIGN(auto request, engine_->prepare(plan.op == Op::kWrite, pieces));
    std::string path = Engine::path_of(*request);
    return make_transfer(*engine_, std::move(request), std::move(volumes), std::move(path));
  }
  static Result<void> check(const Volume& volume, std::uint64_t size, std::uint64_t offset, std::uint64_t length) {
    const auto id = static_cast<unsigned long long>(volume.id), at = static_cast<unsigned long long>(offset);
    if (offset > size || length > size - offset)
      return fail(Code::kInvalidArgument, "GUSLI volume %llu (%s): %llu bytes at offset %llu are beyond its %llu bytes",
                  id, volume.path.c_str(), static_cast<unsigned long long>(length), at,
                  static_cast<unsigned long long>(size));
    if (offset % volume.block_bytes != 0 || length % volume.block_bytes != 0)
      return fail(Code::kInvalidArgument,
                  "GUSLI volume %llu (%s): offset %llu and length %llu must be multiples of its block of %u bytes", id,
                  volume.path.c_str(), at, static_cast<unsigned long long>(length), volume.block_bytes);
    return {};
  }

  const Volumes volumes_;
  std::unique_ptr<Engine> engine_;
};

Result<std::unique_ptr<Backend>> open_gusli(BackendConfig config) {
  const Parameters params("GUSLI", config.params);
  NIXL_ASSIGN(auto volumes, gusli::open_volumes(params.text("config_file")));
  fileio::EngineConfig engine_config;
  NIXL_ASSIGN(const std::int64_t most, params.number("max_num_simultaneous_requests", 256, 1));
  engine_config.depth = static_cast<std::uint32_t>(std::min<std::int64_t>(most, 1024));
  NIXL_ASSIGN(const bool uring, params.flag("try_use_uring"));
  if (uring) engine_config.kind = fileio::EngineKind::kUring;
  auto engine = Engine::open(engine_config);
  if (!engine && uring) {  // "try": anything else will do
    engine_config.kind = fileio::EngineKind::kAutomatic;
    engine = Engine::open(engine_config);
  }
  if (!engine) return fail(engine.error());
  return std::make_unique<Gusli>(std::move(config), std::move(volumes), std::move(*engine));
}

Probe probe_gusli() {
  return {true, "files and kernel devices; volumes of a network server need libgusli_clnt.so",
          staged_memory_kinds() | KindSet{MemKind::kBlock}};
}

}  // namespace

std::span<const BackendEntry> backends_of_gusli() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "GUSLI";
    entry.params = {
        {"client_name", ""}, {"config_file", ""}, {"max_num_simultaneous_requests", "256"}, {"try_use_uring", "false"}};
    entry.kinds = {MemKind::kDram, MemKind::kVram, MemKind::kBlock};
    entry.local = true;
    entry.probe = probe_gusli;
    entry.open = open_gusli;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
