#include "backends/objects/object_backend.h"

#include <algorithm>

#include "http/object_request.h"

namespace nixl::core {
namespace {

constexpr Nanoseconds kQueryPatience = 5'000'000'000;

constexpr Nanoseconds kFirstContact = 2'000'000'000;

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

Result<ObjectPlace> ObjectBackend::open_place(const Region& region) {
  ObjectPlace place;
  place.key = region.meta.empty() ? std::to_string(region.device) : region.meta;
  NIXL_ASSIGN(place.use, keys_->add(region.device, place.key));
  return place;
}

Result<std::unique_ptr<Transfer>> ObjectBackend::prepare_transfer(const Plan& plan) {
  auto places = places_of(plan);
  std::vector<http::ObjectPiece> pieces;
  pieces.reserve(plan.num_blocks);
  NIXL_TRY(each_block(plan, [&](const Block& block) -> Result<void> {
    pieces.push_back({places[block.remote].key, block.offset, block.memory, block.bytes, block.copier});
    return {};
  }));
  NIXL_ASSIGN(auto request, engine_->prepare(plan.op == Op::kWrite, pieces));
  std::string path = request->staged ? "staged+" + path_ : path_;
  return make_transfer(*engine_, std::move(request), std::vector<ObjectPlace>(), std::move(path));
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

Result<std::unique_ptr<http::Client>> open_client(const Parameters& params, const char* ca_bundle_variable) {
  http::ClientConfig config;
  NIXL_ASSIGN(const std::int64_t threads, params.number("num_threads", half_the_cores(), 1));
  config.num_threads = static_cast<unsigned>(std::min<std::int64_t>(threads, 64));
  NIXL_ASSIGN(config.ca_bundle, params.readable_file("ca_bundle", ca_bundle_variable));
  return http::Client::open(config);
}

Result<void> first_contact(http::Client& client, http::Call call, const char* what) {
  call.deadline = Deadline::after(kFirstContact);
  const http::Outcome outcome = client.perform(std::move(call));
  if (!outcome.failed || outcome.error.code == Code::kTimeout) return {};
  return fail(within(what, outcome.error));
}

}  // namespace nixl::core
