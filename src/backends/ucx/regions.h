// Registered and imported memory of the UCX backend.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "backends/ucx/context.h"
#include "backends/ucx/link.h"
#include "contract/backend.h"

namespace nixl::core::ucx {

// What a region stands for, shared with the jobs that serve a peer's reads from it.
struct Exposed {
  std::uint64_t id = 0, address = 0, length = 0;
  std::unique_ptr<Memory> memory;
  std::atomic<bool> revoked{false};
  std::atomic<bool> exported{false};
  std::atomic<int> readers{0};  // jobs with operations in flight on it
};

// Our regions by id, for requests of peers. Thread-safe.
class ExposedTable {
 public:
  std::shared_ptr<Exposed> add(const Region& region, std::unique_ptr<Memory> memory);
  void remove(std::uint64_t id);
  std::shared_ptr<Exposed> find(std::uint64_t id) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::uint64_t, std::shared_ptr<Exposed>> regions_;
  std::uint64_t last_id_ = 0;
};

class Imported;

// Imported regions by peer, so that a peer's revocation finds them. Thread-safe. Adding and removing are what happens
// by the thousand; a revocation may look at all regions of its peer.
class ImportedTable {
 public:
  void add(std::uint64_t incarnation, Imported& region);
  void remove(std::uint64_t incarnation, Imported& region);
  void revoke(std::uint64_t incarnation, std::uint64_t region);

 private:
  std::mutex mutex_;
  std::unordered_map<std::uint64_t, std::vector<Imported*>> regions_;
};

// A peer's region: its key, unpacked once for each link that uses it.
class Imported final : public RemoteRegion {
 public:
  // `key` is what export_key() made. kMismatch when it is not.
  static Result<std::unique_ptr<Imported>> open(std::string_view key, ImportedTable& table, std::uint64_t incarnation);
  ~Imported() override;

  std::uint64_t id() const noexcept { return id_; }
  // The unpacked key for this link; the worker's lock is held.
  Result<ucp_rkey_h> key_locked(Link& link);

  std::atomic<bool> revoked{false};

 private:
  friend class ImportedTable;
  Imported() = default;
  struct Unpacked {
    Worker* worker = nullptr;
    std::uint64_t link = 0, generation = 0;
    ucp_rkey_h key = nullptr;
  };
  ImportedTable* table_ = nullptr;
  std::size_t place_ = 0;  // there
  std::uint64_t incarnation_ = 0;
  std::uint64_t id_ = 0;
  std::string packed_;
  std::vector<Unpacked> keys_;  // one a link and life of its endpoint; operations in flight may use the older ones
};

std::string export_key(const Exposed& region);

}  // namespace nixl::core::ucx
