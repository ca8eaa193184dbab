// Registered and imported memory of the UCX backend.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/network/imported.h"
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

// A peer's region: its key, unpacked once for each link that uses it.
class Imported final : public network::ImportedRegion {
 public:
  // `key` is what export_key() made. kMismatch when it is not.
  static Result<std::unique_ptr<Imported>> open(std::string_view key, network::ImportedTable& table,
                                                std::uint64_t incarnation);
  ~Imported() override;

  // The unpacked key for this link; the worker's lock is held.
  Result<ucp_rkey_h> key_locked(Link& link);

 private:
  Imported(network::ImportedTable& table, std::uint64_t incarnation, std::uint64_t id, std::string_view packed)
      : ImportedRegion(table, incarnation, id), packed_(packed) {}
  struct Unpacked {
    Worker* worker = nullptr;
    std::uint64_t link = 0, generation = 0;
    ucp_rkey_h key = nullptr;
  };
  const std::string packed_;
  std::vector<Unpacked> keys_;  // one a link and life of its endpoint; operations in flight may use the older ones
};

std::string export_key(const Exposed& region);

}  // namespace nixl::core::ucx
