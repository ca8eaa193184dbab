// The Mooncake backend as the agent sees it: the engine moves the data, a post office and lines of our own carry everything else.
#pragma once
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/mooncake/engine.h"
#include "backends/mooncake/line.h"
#include "backends/mooncake/parts.h"
#include "backends/mooncake/post_office.h"
#include "contract/backend.h"

namespace nixl::core::mooncake {

class MooncakeTransfer;

struct OwnRegion final : LocalRegion {
  OwnRegion(Parts& parts, Cuts cuts) : owner(parts), cuts(std::move(cuts)) {}
  ~OwnRegion() override { owner.remove(cuts); }
  Parts& owner;
  const Cuts cuts;
};
struct PeerRegion final : RemoteRegion {
  explicit PeerRegion(Cuts cuts) : cuts(std::move(cuts)) {}
  const Cuts cuts;
};

class MooncakeBackend final : public Backend, public Notifier {
 public:
  static Result<std::unique_ptr<Backend>> open(BackendConfig config, const Api& api, EngineOptions options,
                                               KindSet kinds);
  ~MooncakeBackend() override;

  const Abilities& abilities() const noexcept override { return abilities_; }
  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) override;
  Result<std::string> export_region(const LocalRegion& region) override;
  Result<std::unique_ptr<RemoteRegion>> import_region(Connection& peer, const Region& region,
                                                      std::string_view key) override;
  Result<std::string> export_connection() override;
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view bytes) override;
  Result<std::unique_ptr<Transfer>> prepare(Plan plan) override;
  bool progress() noexcept override;
  int event_fd() const noexcept override { return events_.get(); }
  bool arm() noexcept override;
  Notifier* notifier() noexcept override { return this; }

  Result<void> send(Connection& peer, std::string_view message) override;
  void drain(std::vector<Notification>& out) override;

 private:
  friend class MooncakeTransfer;
  MooncakeBackend(BackendConfig config, EngineOptions options, KindSet kinds, net::Wakeup news);
  Result<void> start(const Api& api);
  bool advance_all_locked();
  void free_abandoned_locked();

  // A batch that the engine has not let go of although its peer is long gone.
  struct Abandoned {
    std::uint64_t batch = Engine::kNoBatch;
    std::uint32_t count = 0, next = 0;
  };

  const BackendConfig config_;
  const EngineOptions options_;
  const Abilities abilities_;
  net::Wakeup news_;  // a message has come, or a line has changed its state
  Fd timer_, events_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Parts> parts_;
  std::unique_ptr<PostOffice> office_;

  std::mutex mutex_;  // transfers, and the counts of requests in the lines
  std::vector<MooncakeTransfer*> running_;
  std::vector<Abandoned> abandoned_;
};

}  // namespace nixl::core::mooncake
