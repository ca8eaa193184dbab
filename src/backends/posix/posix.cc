#include "backends/posix/posix.h"

#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <vector>

#include "base/env.h"
#include "base/log.h"
#include "fileio/engine.h"
#include "fileio/file_table.h"
#include "fileio/request.h"

namespace nixl::core {
namespace {

using fileio::Engine;
using fileio::EngineConfig;
using fileio::EngineKind;
using fileio::File;

struct Self final : Connection {};
struct Memory final : LocalRegion {};
struct FileRegion final : LocalRegion {
  std::shared_ptr<File> file;
};
struct FileTarget final : RemoteRegion {
  std::shared_ptr<File> file;
};

class FileTransfer final : public Transfer {
 public:
  FileTransfer(Engine& engine, std::unique_ptr<fileio::Request> request, std::vector<std::shared_ptr<File>> files)
      : engine_(engine), files_(std::move(files)), request_(std::move(request)) {}

  Result<TransferState> submit(std::optional<std::string_view>) override {
    NIXL_ASSIGN(const auto state, engine_.start(*request_));
    return state_of(state);
  }
  Result<TransferState> poll() override { return state_of(engine_.poll(*request_)); }
  bool cancel() noexcept override { return engine_.cancel(*request_); }
  std::string path() const override { return Engine::path_of(*request_); }

 private:
  Result<TransferState> state_of(Engine::State state) const {
    switch (state) {
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

  Engine& engine_;
  std::vector<std::shared_ptr<File>> files_;  // a handle may be kept after its regions are gone
  std::unique_ptr<fileio::Request> request_;
};

class Posix final : public Backend, private MemoryQuery {
 public:
  Posix(BackendConfig config, std::unique_ptr<Engine> engine)
      : config_(std::move(config)), engine_(std::move(engine)) {}

  const Abilities& abilities() const noexcept override {
    static const Abilities kAbilities{{MemKind::kDram}, {MemKind::kFile}, false, true, true};
    return kAbilities;
  }

  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) override {
    if (region.kind == MemKind::kDram) return std::make_unique<Memory>();
    if (region.kind != MemKind::kFile)
      return fail(Code::kInvalidArgument, "POSIX takes DRAM_SEG and FILE_SEG, not %s", name(region.kind));
    auto added = std::make_unique<FileRegion>();
    NIXL_ASSIGN(added->file, files_.add(region.device, region.meta));
    return added;
  }
  Result<std::unique_ptr<RemoteRegion>> loopback_region(Connection&, const Region& region,
                                                        LocalRegion& local) override {
    if (region.kind != MemKind::kFile) return std::make_unique<RemoteRegion>();
    auto target = std::make_unique<FileTarget>();
    target->file = static_cast<FileRegion&>(local).file;
    return target;
  }
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view) override {
    if (peer.name != config_.self.name)
      return fail(Code::kInvalidArgument, "POSIX serves its own agent '%s' only, not '%s'", config_.self.name.c_str(),
                  peer.name.c_str());
    return std::make_unique<Self>();
  }

  Result<std::unique_ptr<Transfer>> prepare(Plan plan) override {
    if (plan.local_kind != MemKind::kDram || plan.remote_kind != MemKind::kFile)
      return fail(Code::kInvalidArgument, "POSIX moves between DRAM_SEG (local) and FILE_SEG (remote), not %s and %s",
                  name(plan.local_kind), name(plan.remote_kind));
    std::vector<fileio::Piece> pieces;
    pieces.reserve(plan.num_blocks);
    for (std::size_t row = 0; row < plan.num_rows(); ++row) {
      const File* file = static_cast<FileTarget*>(plan.remote_regions[plan.remote_region[row]])->file.get();
      const std::uint64_t count = plan.has_runs() ? plan.count[row] : 1;
      for (std::uint64_t block = 0; block < count; ++block) {
        const std::uint64_t memory = plan.local_address[row] + (block ? block * plan.local_stride[row] : 0);
        const std::uint64_t offset = plan.remote_address[row] + (block ? block * plan.remote_stride[row] : 0);
        pieces.push_back({file, offset, reinterpret_cast<std::byte*>(memory), plan.length[row], nullptr});
      }
    }
    std::vector<std::shared_ptr<File>> files;
    for (RemoteRegion* region : plan.remote_regions) {
      const auto& file = static_cast<FileTarget*>(region)->file;
      if (std::find(files.begin(), files.end(), file) == files.end()) files.push_back(file);
    }
    NIXL_ASSIGN(auto request, engine_->prepare(plan.op == Op::kWrite, pieces));
    return std::make_unique<FileTransfer>(*engine_, std::move(request), std::move(files));
  }

  bool progress() noexcept override { return engine_->progress(); }
  int event_fd() const noexcept override { return engine_->event_fd(); }
  bool arm() noexcept override { return engine_->arm(); }

  MemoryQuery* memory_query() noexcept override { return this; }
  Result<std::vector<std::optional<Params>>> query(std::span<const Region> regions) override {
    std::vector<std::optional<Params>> answers;
    for (const Region& region : regions) {
      NIXL_ASSIGN(const auto mode, fileio::parse_path_mode(region.meta));
      NIXL_ASSIGN(const auto info, fileio::file_info(mode ? mode->path : region.meta));
      if (!info)
        answers.push_back(std::nullopt);
      else
        answers.push_back(Params{{"size", std::to_string(info->size)},
                                 {"mode", std::to_string(info->mode)},
                                 {"mtime", std::to_string(info->mtime)}});
    }
    return answers;
  }

 private:
  BackendConfig config_;
  fileio::FileTable files_;
  std::unique_ptr<Engine> engine_;
};

Result<bool> flag(const Params& params, const char* key) {
  const auto found = params.find(key);
  if (found == params.end() || found->second.empty()) return false;
  const auto value = parse_bool(found->second);
  if (!value)
    return fail(Code::kInvalidArgument, "POSIX parameter %s is '%s': true or false is needed", key,
                found->second.c_str());
  return *value;
}

// A number outside the range is brought into it, with a warning: so the contract of these two has it.
Result<std::uint32_t> number(const Params& params, const char* key, std::int64_t fallback, std::int64_t least,
                             std::int64_t most) {
  const auto found = params.find(key);
  if (found == params.end() || found->second.empty()) return static_cast<std::uint32_t>(fallback);
  const auto value = parse_int(found->second);
  if (!value)
    return fail(Code::kInvalidArgument, "POSIX parameter %s is '%s': a number from %lld to %lld is needed", key,
                found->second.c_str(), static_cast<long long>(least), static_cast<long long>(most));
  const std::int64_t used = std::clamp(*value, least, most);
  if (used != *value)
    NIXL_WARN("POSIX parameter %s is %lld, outside %lld to %lld: %lld is used", key, static_cast<long long>(*value),
              static_cast<long long>(least), static_cast<long long>(most), static_cast<long long>(used));
  return static_cast<std::uint32_t>(used);
}

Result<std::unique_ptr<Backend>> open_posix(BackendConfig config) {
  EngineConfig engine_config;
  constexpr std::pair<const char*, EngineKind> kChoices[] = {
      {"use_aio", EngineKind::kLinuxAio}, {"use_uring", EngineKind::kUring}, {"use_posix_aio", EngineKind::kPosixAio}};
  const char* chosen = nullptr;
  for (const auto& [key, kind] : kChoices) {
    NIXL_ASSIGN(const bool wanted, flag(config.params, key));
    if (!wanted) continue;
    if (chosen)
      return fail(Code::kInvalidArgument, "POSIX parameters %s and %s are both set: one engine at most", chosen, key);
    chosen = key;
    engine_config.kind = kind;
  }
  NIXL_ASSIGN(const std::uint32_t pool, number(config.params, "ios_pool_size", 65536, 64, 65536));
  NIXL_ASSIGN(const std::uint32_t depth, number(config.params, "kernel_queue_size", 256, 16, 1024));
  engine_config.depth = std::min(pool, depth);
  // Copying through the page cache is bound by memory, not by the number of cores.
  engine_config.num_threads = static_cast<unsigned>(std::clamp(::sysconf(_SC_NPROCESSORS_ONLN) / 2, 1l, 8l));
  auto engine = Engine::open(engine_config);
  if (!engine) return fail(chosen ? within(std::string("POSIX parameter ") + chosen, engine.error()) : engine.error());
  if (!(*engine)->reason().empty())
    NIXL_INFO("POSIX queues direct files through %.*s, because of %s",
              static_cast<int>((*engine)->kernel_queue().size()), (*engine)->kernel_queue().data(),
              (*engine)->reason().c_str());
  return std::make_unique<Posix>(std::move(config), std::move(*engine));
}

Probe probe_posix() {
  return {true, "", {MemKind::kDram, MemKind::kFile}};
}

}  // namespace

std::span<const BackendEntry> backends_of_posix() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "POSIX";
    entry.params = {{"ios_pool_size", "65536"},
                    {"kernel_queue_size", "256"},
                    {"use_aio", ""},
                    {"use_posix_aio", ""},
                    {"use_uring", ""}};
    entry.list_params = false;
    entry.kinds = {MemKind::kDram, MemKind::kFile};
    entry.local = true;
    entry.probe = probe_posix;
    entry.open = open_posix;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
