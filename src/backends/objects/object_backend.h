// ObjectBackend: a Backend between memory and named objects, over an ObjectEngine.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "contract/backend.h"
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

class ObjectBackend final : public Backend, private MemoryQuery {
 public:
  // `name`: for messages, "OBJ". `path`: what transfers answer, "https+s3".
  ObjectBackend(std::string name, std::string path, BackendConfig config, std::unique_ptr<http::ObjectEngine> engine)
      : name_(std::move(name)), path_(std::move(path)), config_(std::move(config)), engine_(std::move(engine)) {}

  const Abilities& abilities() const noexcept override;
  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) override;
  Result<std::unique_ptr<RemoteRegion>> loopback_region(Connection&, const Region& region, LocalRegion& local) override;
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view) override;
  Result<std::unique_ptr<Transfer>> prepare(Plan plan) override;
  bool progress() noexcept override { return engine_->drain(); }
  int event_fd() const noexcept override { return engine_->event_fd(); }
  bool arm() noexcept override { return !engine_->drain(); }
  MemoryQuery* memory_query() noexcept override { return this; }
  Result<std::vector<std::optional<Params>>> query(std::span<const Region> regions) override;

 private:
  const std::string name_, path_;
  const BackendConfig config_;
  std::shared_ptr<KeyTable> keys_ = std::make_shared<KeyTable>();
  std::unique_ptr<http::ObjectEngine> engine_;
};

}  // namespace nixl::core
