#include "backends/ucx/regions.h"

#include "base/bytes.h"

namespace nixl::core::ucx {

std::shared_ptr<Exposed> ExposedTable::add(const Region& region, std::unique_ptr<Memory> memory) {
  auto exposed = std::make_shared<Exposed>();
  exposed->address = region.address;
  exposed->length = region.length;
  exposed->memory = std::move(memory);
  const std::lock_guard guard(mutex_);
  exposed->id = ++last_id_;
  regions_.emplace(exposed->id, exposed);
  return exposed;
}

void ExposedTable::remove(std::uint64_t id) {
  const std::lock_guard guard(mutex_);
  regions_.erase(id);
}

std::shared_ptr<Exposed> ExposedTable::find(std::uint64_t id) const {
  const std::lock_guard guard(mutex_);
  const auto found = regions_.find(id);
  return found == regions_.end() ? nullptr : found->second;
}

std::string export_key(const Exposed& region) {
  ByteWriter out;
  out.put_all(kMessageVersion, region.id);
  out.put_text(region.memory->remote_key());
  return sealed(out.take());
}

Result<std::unique_ptr<Imported>> Imported::open(std::string_view key, network::ImportedTable& table,
                                                 std::uint64_t incarnation) {
  NIXL_ASSIGN(const std::string_view content, unsealed(key, "UCX"));
  ByteReader in(content);
  NIXL_ASSIGN(const auto version, in.get<std::uint32_t>());
  if (version != kMessageVersion)
    return fail(Code::kMismatch, "UCX region key of version 0x%x, this side speaks 0x%x", version, kMessageVersion);
  NIXL_ASSIGN(const auto id, in.get<std::uint64_t>());
  NIXL_ASSIGN(const std::string_view packed, in.get_text(kMaxKeyBytes));
  if (packed.empty() || in.left() != 0)
    return fail(Code::kMismatch, "UCX region key of %zu bytes is not whole", key.size());
  return std::unique_ptr<Imported>(new Imported(table, incarnation, id, packed));
}

Imported::~Imported() {
  for (const Unpacked& unpacked : keys_) {
    const auto guard = unpacked.worker->lock();
    unpacked.worker->api().rkey_destroy(unpacked.key);
  }
}

Result<ucp_rkey_h> Imported::key_locked(Link& link) {
  for (const Unpacked& unpacked : keys_)
    if (unpacked.link == link.id() && unpacked.generation == link.generation()) return unpacked.key;
  const Api& api = link.worker().api();
  ucp_rkey_h key = nullptr;
  if (const ucs_status_t status = api.ep_rkey_unpack(link.endpoint(), packed_.data(), &key); status != UCS_OK)
    return fail(ucx_error(api, "unpack the key of a region of agent '" + link.target().name + "'", status));
  keys_.push_back({&link.worker(), link.id(), link.generation(), key});
  return key;
}

}  // namespace nixl::core::ucx
