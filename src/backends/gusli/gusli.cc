#include "backends/gusli/gusli.h"

#include <algorithm>

#include "backends/gusli/volumes.h"
#include "base/env.h"
#include "fileio/engine.h"
#include "fileio/request.h"

namespace nixl::core {
namespace {

using fileio::Engine;
using gusli::Volume;

struct Self final : Connection {};
struct Memory final : LocalRegion {};
struct VolumeRegion final : LocalRegion {
  std::shared_ptr<Volume> volume;
};
struct VolumeTarget final : RemoteRegion {
  std::shared_ptr<Volume> volume;
};

class BlockTransfer final : public Transfer {
 public:
  BlockTransfer(Engine& engine, std::unique_ptr<fileio::Request> request, std::vector<std::shared_ptr<Volume>> volumes)
      : engine_(engine), volumes_(std::move(volumes)), request_(std::move(request)) {}
  Result<TransferState> submit(std::optional<std::string_view>) override {
    NIXL_ASSIGN(const auto state, engine_.start(*request_));
    return state == Engine::State::kDone ? TransferState::kDone : TransferState::kRunning;
  }
  Result<TransferState> poll() override {
    switch (engine_.poll(*request_)) {
      case Engine::State::kRunning:
        return TransferState::kRunning;
      case Engine::State::kDone:
        return TransferState::kDone;
      case Engine::State::kFailed:
        return fail(Engine::error_of(*request_));
      case Engine::State::kIdle:
        break;
    }
    return fail(Code::kNotPosted, "the transfer was never submitted");
  }
  bool cancel() noexcept override { return engine_.cancel(*request_); }
  std::string path() const override { return Engine::path_of(*request_); }

 private:
  Engine& engine_;
  std::vector<std::shared_ptr<Volume>> volumes_;
  std::unique_ptr<fileio::Request> request_;
};

class Gusli final : public Backend {
 public:
  Gusli(BackendConfig config, std::map<std::uint64_t, std::shared_ptr<Volume>> volumes, std::unique_ptr<Engine> engine)
      : config_(std::move(config)), volumes_(std::move(volumes)), engine_(std::move(engine)) {}

  const Abilities& abilities() const noexcept override {
    static const Abilities kAbilities{{MemKind::kDram}, {MemKind::kBlock}, false, true, true};
    return kAbilities;
  }
  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) override {
    if (region.kind == MemKind::kDram) return std::make_unique<Memory>();
    if (region.kind != MemKind::kBlock)
      return fail(Code::kInvalidArgument, "GUSLI takes DRAM_SEG and BLK_SEG, not %s", name(region.kind));
    const auto found = volumes_.find(region.device);
    if (found == volumes_.end()) {
      std::string known;
      for (const auto& [id, volume] : volumes_) known += (known.empty() ? "" : ", ") + std::to_string(id);
      return fail(Code::kInvalidArgument, "GUSLI has no volume %llu; config_file names: %s",
                  static_cast<unsigned long long>(region.device), known.empty() ? "none" : known.c_str());
    }
    auto added = std::make_unique<VolumeRegion>();
    added->volume = found->second;
    return added;
  }
  Result<std::unique_ptr<RemoteRegion>> loopback_region(Connection&, const Region& region,
                                                        LocalRegion& local) override {
    if (region.kind != MemKind::kBlock) return std::make_unique<RemoteRegion>();
    auto target = std::make_unique<VolumeTarget>();
    target->volume = static_cast<VolumeRegion&>(local).volume;
    return target;
  }
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view) override {
    if (peer.name != config_.self.name)
      return fail(Code::kInvalidArgument, "GUSLI serves its own agent '%s' only, not '%s'", config_.self.name.c_str(),
                  peer.name.c_str());
    return std::make_unique<Self>();
  }

  // One scatter-gather I/O, which "-sgl" asks for, is what neighbours become in any case.
  Result<std::unique_ptr<Transfer>> prepare(Plan plan) override {
    if (plan.local_kind != MemKind::kDram || plan.remote_kind != MemKind::kBlock)
      return fail(Code::kInvalidArgument, "GUSLI moves between DRAM_SEG (local) and BLK_SEG (remote), not %s and %s",
                  name(plan.local_kind), name(plan.remote_kind));
    std::vector<std::shared_ptr<Volume>> volumes;
    std::vector<std::uint64_t> sizes;
    for (RemoteRegion* region : plan.remote_regions) {
      volumes.push_back(static_cast<VolumeTarget*>(region)->volume);
      const Volume& volume = *volumes.back();
      if (plan.op == Op::kWrite && !volume.writable)
        return fail(Code::kInvalidArgument,
                    "GUSLI volume %llu (%s) is for reading only: its access is R in config_file",
                    static_cast<unsigned long long>(volume.id), volume.path.c_str());
      NIXL_ASSIGN(const std::uint64_t size, volume.size());
      sizes.push_back(size);
    }
    std::vector<fileio::Piece> pieces;
    pieces.reserve(plan.num_blocks);
    for (std::size_t row = 0; row < plan.num_rows(); ++row) {
      const std::uint32_t index = plan.remote_region[row];
      const std::uint64_t count = plan.has_runs() ? plan.count[row] : 1;
      for (std::uint64_t block = 0; block < count; ++block) {
        const std::uint64_t memory = plan.local_address[row] + (block ? block * plan.local_stride[row] : 0);
        const std::uint64_t offset = plan.remote_address[row] + (block ? block * plan.remote_stride[row] : 0);
        NIXL_TRY(check(*volumes[index], sizes[index], offset, plan.length[row]));
        pieces.push_back(
            {volumes[index]->file.get(), offset, reinterpret_cast<std::byte*>(memory), plan.length[row], nullptr});
      }
    }
    NIXL_ASSIGN(auto request, engine_->prepare(plan.op == Op::kWrite, pieces));
    return std::make_unique<BlockTransfer>(*engine_, std::move(request), std::move(volumes));
  }

  bool progress() noexcept override { return engine_->progress(); }
  int event_fd() const noexcept override { return engine_->event_fd(); }
  bool arm() noexcept override { return engine_->arm(); }

 private:
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

  const BackendConfig config_;
  std::map<std::uint64_t, std::shared_ptr<Volume>> volumes_;
  std::unique_ptr<Engine> engine_;
};

Result<std::unique_ptr<Backend>> open_gusli(BackendConfig config) {
  const auto text = [&](const char* key) {
    const auto found = config.params.find(key);
    return found == config.params.end() ? std::string() : found->second;
  };
  NIXL_ASSIGN(auto volumes, gusli::open_volumes(text("config_file")));
  fileio::EngineConfig engine_config;
  if (const std::string most = text("max_num_simultaneous_requests"); !most.empty()) {
    const auto value = parse_int(most);
    if (!value || *value < 1)
      return fail(Code::kInvalidArgument,
                  "GUSLI parameter max_num_simultaneous_requests is '%s': a number >= 1 is needed", most.c_str());
    engine_config.depth = static_cast<std::uint32_t>(std::min<std::int64_t>(*value, 1024));
  }
  const std::string uring = text("try_use_uring");
  const auto wanted = uring.empty() ? std::optional<bool>(false) : parse_bool(uring);
  if (!wanted)
    return fail(Code::kInvalidArgument, "GUSLI parameter try_use_uring is '%s': true or false is needed",
                uring.c_str());
  if (*wanted) engine_config.kind = fileio::EngineKind::kUring;
  auto engine = Engine::open(engine_config);
  if (!engine && *wanted) {  // "try": anything else will do
    engine_config.kind = fileio::EngineKind::kAutomatic;
    engine = Engine::open(engine_config);
  }
  if (!engine) return fail(engine.error());
  return std::make_unique<Gusli>(std::move(config), std::move(volumes), std::move(*engine));
}

Probe probe_gusli() {
  return {true,
          "files and kernel devices; volumes of a network server need libgusli_clnt.so",
          {MemKind::kDram, MemKind::kBlock}};
}

}  // namespace

std::span<const BackendEntry> backends_of_gusli() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "GUSLI";
    entry.params = {
        {"client_name", ""}, {"config_file", ""}, {"max_num_simultaneous_requests", "256"}, {"try_use_uring", "false"}};
    entry.kinds = {MemKind::kDram, MemKind::kBlock};
    entry.local = true;
    entry.probe = probe_gusli;
    entry.open = open_gusli;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
