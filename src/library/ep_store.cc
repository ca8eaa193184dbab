// Buffers without a store of their own meet in etcd, if NIXL_ETCD_ENDPOINTS is set.
#include <string>

#include "agent/catalog.h"
#include "base/env.h"
#include "contract/store.h"
#include "ep/default_store.h"
#include "tables.h"

namespace nixl::core {
namespace {

constexpr Nanoseconds kLease_ns = 10'000'000'000;  // a killed rank's key is gone after this

class PrefixedStore final : public Store {
 public:
  PrefixedStore(std::unique_ptr<Store> store, std::string prefix)
      : store_(std::move(store)), prefix_(std::move(prefix)) {}
  Result<void> publish(std::string_view key, std::string_view value) override {
    return store_->publish(full(key), value);
  }
  Result<std::string> fetch(std::string_view key, Deadline deadline) override {
    return store_->fetch(full(key), deadline);
  }
  Result<void> withdraw(std::string_view key) override { return store_->withdraw(full(key)); }

 private:
  std::string full(std::string_view key) const { return prefix_ + std::string(key); }
  const std::unique_ptr<Store> store_;
  const std::string prefix_;
};

Result<std::shared_ptr<Store>> open_etcd() {
  const auto endpoints = env_text("NIXL_ETCD_ENDPOINTS");
  if (!endpoints) return nullptr;
  const StoreEntry* entry = process_catalog().store("etcd");
  if (!entry)
    return fail(Code::kUnsupported,
                "NIXL_ETCD_ENDPOINTS is set, but this build has no etcd store (libcurl was missing)");
  StoreConfig config;
  config.endpoint = *endpoints;
  config.lease_ns = kLease_ns;
  NIXL_ASSIGN(auto store, entry->open(std::move(config)));
  return std::make_shared<PrefixedStore>(std::move(store), env_text("NIXL_ETCD_NAMESPACE").value_or("/nixl/agents/"));
}

[[maybe_unused]] const bool kRegistered = (ep::set_default_store(open_etcd), true);

}  // namespace
}  // namespace nixl::core
