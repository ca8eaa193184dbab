// ObjectBackend: a Backend between memory and named objects, over an ObjectEngine.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "backends/storage/parameters.h"
#include "backends/storage/storage_backend.h"
#include "http/objects.h"

namespace nixl::core {

// Keys by the caller's id. Two registrations of one id must name the same key.
class KeyTable : public std::enable_shared_from_this<KeyTable> {
 public:
  // Held by a registration; the id is free again when the last one is gone.
  class Use {
   public:
    Use(std::shared_ptr<KeyTable> table, std::uint64_t id) : table_(std::move(table)), id_(id) {}
    ~Use() { table_->remove(id_); }

   private:
    std::shared_ptr<KeyTable> table_;
    std::uint64_t id_;
  };
  Result<std::shared_ptr<Use>> add(std::uint64_t id, const std::string& key);

 private:
  void remove(std::uint64_t id);
  struct Entry {
    std::string key;
    std::size_t uses = 0;
  };
  std::mutex mutex_;
  std::map<std::uint64_t, Entry> keys_;
};

// A registered key: the id stays taken as long as this is kept.
struct ObjectPlace {
  std::string key;
  std::shared_ptr<KeyTable::Use> use;
};

class ObjectBackend final : public StorageBackend<ObjectPlace>, private MemoryQuery {
 public:
  // `name`: for messages, "OBJ". `path`: what transfers answer, "https+s3".
  ObjectBackend(std::string name, std::string path, BackendConfig config, std::unique_ptr<http::ObjectEngine> engine)
      : StorageBackend(std::move(name), std::move(config), MemKind::kObject),
        path_(std::move(path)),
        engine_(std::move(engine)) {}

  bool progress() noexcept override { return engine_->drain(); }
  int event_fd() const noexcept override { return engine_->event_fd(); }
  bool arm() noexcept override { return !engine_->drain(); }
  MemoryQuery* memory_query() noexcept override { return this; }
  Result<std::vector<std::optional<Params>>> query(std::span<const Region> regions) override;

 private:
  Result<ObjectPlace> open_place(const Region& region) override;
  Result<std::unique_ptr<Transfer>> prepare_transfer(const Plan& plan) override;

  const std::string path_;
  std::shared_ptr<KeyTable> keys_ = std::make_shared<KeyTable>();
  std::unique_ptr<http::ObjectEngine> engine_;
};

// The HTTP client that the parameters num_threads and ca_bundle ask for.
Result<std::unique_ptr<http::Client>> open_client(const Parameters& params, const char* ca_bundle_variable = nullptr);
// Is the server there? One that refuses at once is told now, not at the first transfer; what it answers does not
// matter: the rights to look at the bucket may be missing where those to use its objects are given. `what`: for the
// message.
Result<void> first_contact(http::Client& client, http::Call call, const char* what);

}  // namespace nixl::core
