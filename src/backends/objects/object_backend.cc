#include "backends/objects/object_backend.h"

#include "http/object_request.h"

namespace nixl::core {
namespace {

using http::ObjectEngine;

constexpr Nanoseconds kQueryPatience = 5'000'000'000;

struct Self final : Connection {};
struct Memory final : LocalRegion {};
struct ObjectRegion final : LocalRegion {
  std::string key;
  std::shared_ptr<KeyTable::Use> use;
};
struct ObjectTarget final : RemoteRegion {
  std::string key;
};

std::string key_of(const Region& region) {
  return region.meta.empty() ? std::to_string(region.device) : region.meta;
}

class ObjectTransfer final : public Transfer {
 public:
  ObjectTransfer(ObjectEngine& engine, std::unique_ptr<http::ObjectRequest> request, std::string path)
      : engine_(engine), request_(std::move(request)), path_(std::move(path)) {}

  Result<TransferState> submit(std::optional<std::string_view>) override {
    NIXL_ASSIGN(const auto state, engine_.start(*request_));
    return state == ObjectEngine::State::kDone ? TransferState::kDone : TransferState::kRunning;
  }
  Result<TransferState> poll() override {
    switch (engine_.state_of(*request_)) {
      case ObjectEngine::State::kRunning:
        return TransferState::kRunning;
      case ObjectEngine::State::kDone:
        return TransferState::kDone;
      case ObjectEngine::State::kFailed:
        return fail(ObjectEngine::error_of(*request_));
      case ObjectEngine::State::kIdle:
        break;
    }
    return fail(Code::kNotPosted, "the transfer was never submitted");
  }
  bool cancel() noexcept override { return engine_.cancel(*request_); }
  std::string path() const override { return path_; }

 private:
  ObjectEngine& engine_;
  std::unique_ptr<http::ObjectRequest> request_;
  std::string path_;
};

}  // namespace

Result<std::shared_ptr<KeyTable::Use>> KeyTable::add(std::uint64_t id, const std::string& key) {
  const std::lock_guard lock(mutex_);
  Entry& entry = keys_[id];
  if (entry.uses > 0 && entry.key != key)
    return fail(Code::kInvalidArgument,
                "object id %llu is registered for key \"%s\" and cannot stand for \"%s\" too: give each key its own id",
                static_cast<unsigned long long>(id), entry.key.c_str(), key.c_str());
  entry.key = key;
  ++entry.uses;
  return std::make_shared<Use>(shared_from_this(), id);
}

void KeyTable::remove(std::uint64_t id) {
  const std::lock_guard lock(mutex_);
  const auto at = keys_.find(id);
  if (--at->second.uses == 0) keys_.erase(at);
}

const Abilities& ObjectBackend::abilities() const noexcept {
  static const Abilities kAbilities{{MemKind::kDram}, {MemKind::kObject}, false, true, true};
  return kAbilities;
}

Result<std::unique_ptr<LocalRegion>> ObjectBackend::add_region(const Region& region) {
  if (region.kind == MemKind::kDram) return std::make_unique<Memory>();
  if (region.kind != MemKind::kObject)
    return fail(Code::kUnsupported, "%s takes DRAM_SEG and OBJ_SEG, not %s", name_.c_str(),
                nixl::core::name(region.kind));
  auto added = std::make_unique<ObjectRegion>();
  added->key = key_of(region);
  NIXL_ASSIGN(added->use, keys_->add(region.device, added->key));
  return added;
}

Result<std::unique_ptr<RemoteRegion>> ObjectBackend::loopback_region(Connection&, const Region& region,
                                                                     LocalRegion& local) {
  if (region.kind != MemKind::kObject) return std::make_unique<RemoteRegion>();
  auto target = std::make_unique<ObjectTarget>();
  target->key = static_cast<ObjectRegion&>(local).key;
  return target;
}

Result<std::unique_ptr<Connection>> ObjectBackend::connect(const PeerId& peer, std::string_view) {
  if (peer.name != config_.self.name)
    return fail(Code::kInvalidArgument, "%s serves its own agent '%s' only, not '%s'", name_.c_str(),
                config_.self.name.c_str(), peer.name.c_str());
  return std::make_unique<Self>();
}

Result<std::unique_ptr<Transfer>> ObjectBackend::prepare(Plan plan) {
  if (plan.local_kind != MemKind::kDram || plan.remote_kind != MemKind::kObject)
    return fail(Code::kInvalidArgument, "%s moves between DRAM_SEG (local) and OBJ_SEG (remote), not %s and %s",
                name_.c_str(), nixl::core::name(plan.local_kind), nixl::core::name(plan.remote_kind));
  std::vector<http::ObjectPiece> pieces;
  pieces.reserve(plan.num_blocks);
  for (std::size_t row = 0; row < plan.num_rows(); ++row) {
    const std::string& key = static_cast<ObjectTarget*>(plan.remote_regions[plan.remote_region[row]])->key;
    const std::uint64_t count = plan.has_runs() ? plan.count[row] : 1;
    for (std::uint64_t block = 0; block < count; ++block) {
      const std::uint64_t memory = plan.local_address[row] + (block ? block * plan.local_stride[row] : 0);
      const std::uint64_t offset = plan.remote_address[row] + (block ? block * plan.remote_stride[row] : 0);
      pieces.push_back({key, offset, reinterpret_cast<std::byte*>(memory), plan.length[row]});
    }
  }
  NIXL_ASSIGN(auto request, engine_->prepare(plan.op == Op::kWrite, pieces));
  return std::make_unique<ObjectTransfer>(*engine_, std::move(request), path_);
}

Result<std::vector<std::optional<Params>>> ObjectBackend::query(std::span<const Region> regions) {
  std::vector<std::string> keys;
  for (const Region& region : regions)
    if (!region.meta.empty()) keys.push_back(region.meta);
  NIXL_ASSIGN(const std::vector<bool> there, engine_->exist(keys, Deadline::after(kQueryPatience)));
  std::vector<std::optional<Params>> answers;
  std::size_t next = 0;
  for (const Region& region : regions)
    answers.push_back(!region.meta.empty() && there[next++] ? std::optional<Params>(Params{}) : std::nullopt);
  return answers;
}

}  // namespace nixl::core
