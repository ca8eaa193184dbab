#include "backends/posix/posix.h"

#include <algorithm>
#include <vector>

#include "backends/storage/file_query.h"
#include "backends/storage/parameters.h"
#include "backends/storage/storage_backend.h"
#include "base/log.h"
#include "fileio/engine.h"
#include "fileio/file_table.h"
#include "fileio/request.h"

namespace nixl::core {
namespace {

using fileio::Engine;
using fileio::EngineConfig;
using fileio::EngineKind;
using FilePlace = std::shared_ptr<fileio::File>;

class Posix final : public StorageBackend<FilePlace> {
 public:
  Posix(BackendConfig config, std::unique_ptr<Engine> engine)
      : StorageBackend("POSIX", std::move(config), MemKind::kFile), engine_(std::move(engine)) {}

  bool progress() noexcept override { return engine_->progress(); }
  int event_fd() const noexcept override { return engine_->event_fd(); }
  bool arm() noexcept override { return engine_->arm(); }
  MemoryQuery* memory_query() noexcept override { return &query_; }

 private:
  Result<FilePlace> open_place(const Region& region) override { return files_.add(region.device, region.meta); }

  Result<std::unique_ptr<Transfer>> prepare_transfer(const Plan& plan) override {
    auto files = places_of(plan);
    std::vector<fileio::Piece> pieces;
    pieces.reserve(plan.num_blocks);
    NIXL_TRY(each_block(plan, [&](const Block& block) -> Result<void> {
      pieces.push_back({files[block.remote].get(), block.offset, block.memory, block.bytes, block.copier});
      return {};
    }));
    NIXL_ASSIGN(auto request, engine_->prepare(plan.op == Op::kWrite, pieces));
    std::string path = Engine::path_of(*request);
    return make_transfer(*engine_, std::move(request), std::move(files), std::move(path));
  }

  FileQuery query_;
  fileio::FileTable files_;
  std::unique_ptr<Engine> engine_;
};

Result<std::unique_ptr<Backend>> open_posix(BackendConfig config) {
  const Parameters params("POSIX", config.params);
  EngineConfig engine_config;
  constexpr std::pair<const char*, EngineKind> kChoices[] = {
      {"use_aio", EngineKind::kLinuxAio}, {"use_uring", EngineKind::kUring}, {"use_posix_aio", EngineKind::kPosixAio}};
  const char* chosen = nullptr;
  for (const auto& [key, kind] : kChoices) {
    NIXL_ASSIGN(const bool wanted, params.flag(key));
    if (!wanted) continue;
    if (chosen)
      return fail(Code::kInvalidArgument, "POSIX parameters %s and %s are both set: one engine at most", chosen, key);
    chosen = key;
    engine_config.kind = kind;
  }
  // Programs pass any numbers here: these two are brought into their range, not refused.
  NIXL_ASSIGN(const std::int64_t pool, params.clamped("ios_pool_size", 65536, 64, 65536));
  NIXL_ASSIGN(const std::int64_t depth, params.clamped("kernel_queue_size", 256, 16, 1024));
  engine_config.depth = static_cast<std::uint32_t>(std::min(pool, depth));
  // Copying through the page cache is bound by memory, not by the number of cores.
  engine_config.num_threads = std::min(half_the_cores(), 8u);
  auto engine = Engine::open(engine_config);
  if (!engine) return fail(chosen ? within(std::string("POSIX parameter ") + chosen, engine.error()) : engine.error());
  if (!(*engine)->reason().empty())
    NIXL_INFO("POSIX queues direct files through %.*s, because of %s",
              static_cast<int>((*engine)->kernel_queue().size()), (*engine)->kernel_queue().data(),
              (*engine)->reason().c_str());
  return std::make_unique<Posix>(std::move(config), std::move(*engine));
}

Probe probe_posix() {
  return {true, "", staged_memory_kinds() | KindSet{MemKind::kFile}};
}

}  // namespace

std::span<const BackendEntry> backends_of_posix() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "POSIX";
    entry.params = {{"ios_pool_size", "65536"},
                    {"kernel_queue_size", "256"},
                    {"use_aio", "false"},
                    {"use_posix_aio", "false"},
                    {"use_uring", "false"}};
    entry.list_params = false;
    entry.kinds = {MemKind::kDram, MemKind::kVram, MemKind::kFile};
    entry.local = true;
    entry.probe = probe_posix;
    entry.open = open_posix;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
