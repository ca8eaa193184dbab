// The same-host backend: transfers between processes of one host without a network stack. See docs/samehost.md.
#include <sys/random.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>

#include "backends/samehost/puller.h"
#include "backends/samehost/transfer.h"
#include "backends/samehost/vram.h"
#include "base/bytes.h"
#include "base/env.h"
#include "base/log.h"
#include "contract/entry.h"

namespace nixl::core {
namespace samehost {
namespace {

KindSet usable_kinds() {
  KindSet kinds{MemKind::kDram};
  if (Vram::probe()) kinds.add(MemKind::kVram);
  return kinds;
}

constexpr Nanoseconds kLookEvery = 50'000;  // between two looks at the descriptors while progress is being polled

class SameHostBackend final : public Backend, private Notifier, private CostModel {
 public:
  static Result<std::unique_ptr<Backend>> open(BackendConfig config);
  ~SameHostBackend() override;

  const Abilities& abilities() const noexcept override { return abilities_; }
  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) override;
  Result<std::string> export_region(const LocalRegion& region) override;
  Result<std::unique_ptr<RemoteRegion>> import_region(Connection& peer, const Region& region,
                                                      std::string_view key) override;
  Result<std::string> export_connection() override;
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view bytes) override;
  Result<std::unique_ptr<Transfer>> prepare(Plan plan) override;
  bool progress() noexcept override;
  int event_fd() const noexcept override { return peers_->epoll_fd(); }
  bool arm() noexcept override;
  void share_callers_event(int eventfd) noexcept override { mailbox_->share_callers_event(eventfd); }
  Notifier* notifier() noexcept override { return this; }
  CostModel* cost_model() noexcept override { return this; }

 private:
  Result<void> send(Connection& peer, std::string_view message) override;
  void drain(std::vector<Notification>& out) override;
  Result<CostEstimate> estimate(const Transfer& transfer) override;
  void pull_offered();
  Result<Vram*> vram();  // opened at the first GPU region; set-up calls only

  BackendConfig config_;
  Abilities abilities_;
  std::shared_ptr<Mailbox> mailbox_;
  std::shared_ptr<SlotTable> slots_;
  std::shared_ptr<PeerTable> peers_;
  std::shared_ptr<CopyThreads> threads_;
  std::shared_ptr<HugePages> pages_;  // null: off
  SharedMemory shared_;
  std::unique_ptr<Puller> puller_;  // null: nothing is pulled, here and at peers
  std::atomic<bool> pages_started_{false};
  std::string host_;
  std::atomic<bool> slept_{false};
  std::atomic<Nanoseconds> looked_at_{0};
  std::atomic<bool> warned_{false}, warned_vram_{false};
  std::unique_ptr<Vram> vram_;
  std::atomic<Vram*> vram_in_use_{nullptr};
};

Result<std::unique_ptr<Backend>> SameHostBackend::open(BackendConfig config) {
  auto backend = std::make_unique<SameHostBackend>();
  std::uint64_t incarnation = 0;
  if (::getrandom(&incarnation, sizeof incarnation, 0) != sizeof incarnation)
    return fail(errno_error("getrandom", errno));
  NIXL_ASSIGN(backend->pages_, HugePages::open(config.params));
  NIXL_ASSIGN(backend->shared_, SharedMemory::open());
  NIXL_ASSIGN(backend->mailbox_, Mailbox::open(incarnation, config.self.name));
  NIXL_ASSIGN(backend->peers_, PeerTable::open(config.events, backend->mailbox_->socket()));
  backend->slots_ = std::make_shared<SlotTable>(backend->mailbox_);
  NIXL_ASSIGN(const std::optional<bool> pull, env_bool(Puller::kEnv));
  if (pull.value_or(true)) backend->puller_ = std::make_unique<Puller>(backend->mailbox_, backend->slots_);
  backend->abilities_.local_kinds = backend->abilities_.remote_kinds = usable_kinds();
  backend->abilities_.remote = backend->abilities_.local = true;
  Address address;
  NIXL_ASSIGN(address.host, host_identity());
  backend->host_ = address.host;
  Segment& segment = backend->mailbox_->segment();
  address.pid = segment.header().pid;
  address.segment_fd = static_cast<std::uint32_t>(segment.fd());
  address.header_address = reinterpret_cast<std::uint64_t>(&segment.header());
  address.incarnation = incarnation;
  address.doorbell = backend->mailbox_->doorbell_name();
  backend->mailbox_->set_address(address.encode());
  backend->config_ = std::move(config);
  return backend;
}

Result<Vram*> SameHostBackend::vram() {
  if (!vram_) {
    NIXL_ASSIGN(vram_, Vram::open(mailbox_));
    vram_in_use_.store(vram_.get(), std::memory_order_release);
  }
  return vram_.get();
}

Result<std::unique_ptr<LocalRegion>> SameHostBackend::add_region(const Region& region) {
  std::unique_ptr<VramExport> exported;
  if (region.kind == MemKind::kVram) {
    auto done = vram().and_then([&](Vram* gpu) { return gpu->export_region(region); });
    if (!done) {
      if (!warned_vram_.exchange(true))
        NIXL_WARN("GPU memory at %#llx cannot take the same-host path: %s",
                  static_cast<unsigned long long>(region.address), done.error().reason.c_str());
      return fail(std::move(done).error());
    }
    exported = std::move(*done);
  } else if (region.kind != MemKind::kDram) {
    return fail(Code::kUnsupported, "%s is not moved by the same-host path", name(region.kind));
  }
  const bool is_dram = region.kind == MemKind::kDram;
  NIXL_ASSIGN(const auto slot, slots_->take(is_dram ? region.address : 0, is_dram ? region.length : 0));
  HugeRange pages(is_dram ? pages_ : nullptr, region.address, region.length);
  auto own = std::make_unique<OwnRegion>(slots_, slot.first, slot.second, std::move(exported), std::move(pages));
  own->address = region.address, own->bytes = region.length;
  if (is_dram) own->shared = shared_.find(region);
  return own;
}

Result<std::string> SameHostBackend::export_region(const LocalRegion& region) {
  const auto& own = static_cast<const OwnRegion&>(region);
  ByteWriter out;
  out.put(own.slot());
  out.put(own.generation());
  if (own.vram()) out.put_raw(own.vram()->key());
  if (own.shared) own.shared->encode(out);
  return out.take();
}

Result<std::unique_ptr<RemoteRegion>> SameHostBackend::import_region(Connection& peer, const Region& region,
                                                                     std::string_view key) {
  auto& connection = static_cast<PeerConnection&>(peer);
  ByteReader in(key);
  NIXL_ASSIGN(const std::uint32_t slot, in.get<std::uint32_t>());
  NIXL_ASSIGN(const std::uint64_t generation, in.get<std::uint64_t>());
  const bool is_vram = region.kind == MemKind::kVram;
  if (slot >= kNumSlots || generation == 0 || (is_vram && in.left() == 0))
    return fail(Code::kMismatch, "a same-host key for %s with slot %u (below %u wanted) and %zu more bytes",
                name(region.kind), slot, kNumSlots, in.left());
  std::unique_ptr<VramMapping> mapping;
  if (is_vram) {
    NIXL_ASSIGN(Vram* const gpu, vram());
    NIXL_ASSIGN(mapping, gpu->map_region(connection.process(), region, key.substr(in.offset())));
  }
  std::unique_ptr<SharedMapping> shared;
  if (!is_vram && in.left() != 0) {
    NIXL_ASSIGN(shared, shared_.map(connection.process(), region, in));
    if (in.left() != 0)
      return fail(Code::kMismatch, "a same-host key for %s with %zu bytes too many", name(region.kind), in.left());
  }
  auto far = std::make_unique<FarRegion>(connection, slot, generation, std::move(mapping), std::move(shared));
  far->address = region.address, far->bytes = region.length;
  return far;
}

Result<std::string> SameHostBackend::export_connection() {
  allow_peers();
  return mailbox_->address();
}

Result<std::unique_ptr<Connection>> SameHostBackend::connect(const PeerId& peer, std::string_view bytes) {
  NIXL_ASSIGN(const Address address, Address::decode(bytes));
  if (address.host != host_) return fail(Code::kUnsupported, "agent '%s' is on another host", peer.name.c_str());
  auto process = PeerProcess::open(address);
  auto writer = process ? LaneWriter::claim(process->segment(), config_.self.name) : fail(process.error());
  if (!writer) {
    if (writer.error().code == Code::kUnsupported && !warned_.exchange(true))
      NIXL_WARN("agent '%s' is on this host, but the same-host path cannot be used: %s", peer.name.c_str(),
                writer.error().reason.c_str());
    return fail(std::move(writer).error());
  }
  auto connection =
      std::make_unique<PeerConnection>(peer, std::move(*process), std::move(*writer), address, mailbox_, peers_);
  NIXL_TRY(peers_->add(*connection));
  connection->announce();
  if (pages_ && peer.name != config_.self.name) pages_->start();
  return connection;
}

Result<std::unique_ptr<Transfer>> SameHostBackend::prepare(Plan plan) {
  if (plan.local_kind == MemKind::kDram && plan.remote_kind == MemKind::kDram)
    return make_copy(std::move(plan), mailbox_, threads_, puller_ != nullptr);
  if (!abilities_.local_kinds.has(plan.local_kind) || !abilities_.remote_kinds.has(plan.remote_kind))
    return fail(Code::kInvalidArgument, "%s to %s is not moved by the same-host path", name(plan.local_kind),
                name(plan.remote_kind));
  if (!threads_) threads_ = CopyThreads::shared();
  NIXL_ASSIGN(Vram* const gpu, vram());
  return gpu->prepare(std::move(plan), threads_);
}

SameHostBackend::~SameHostBackend() {
  if (!mailbox_) return;
  SegmentHeader& header = mailbox_->segment().header();
  if (header.pid == static_cast<std::uint32_t>(::getpid())) header.closed.store(1, std::memory_order_release);
}

void SameHostBackend::pull_offered() {
  for (const std::string& offer : mailbox_->take_offers())
    if (puller_) puller_->accept(offer);
}

bool SameHostBackend::progress() noexcept {
  bool any = mailbox_->collect();
  if (mailbox_->has_offers()) pull_offered();
  if (pages_ && mailbox_->met_peer() && !pages_started_.load(std::memory_order_relaxed) &&
      !pages_started_.exchange(true))
    pages_->start();
  const Nanoseconds now = now_ns();
  if (slept_.exchange(false, std::memory_order_acq_rel) ||
      now - looked_at_.load(std::memory_order_relaxed) >= kLookEvery) {
    looked_at_.store(now, std::memory_order_relaxed);
    bool rung = false;
    any |= peers_->serve(rung);
    if (rung) mailbox_->silence();
  }
  if (peers_->has_backlog()) any |= peers_->push_backlogs();
  if (Vram* const gpu = vram_in_use_.load(std::memory_order_acquire)) any |= gpu->progress();
  return any;
}

bool SameHostBackend::arm() noexcept {
  slept_.store(true, std::memory_order_release);
  // The device rings no bell: while it works, progress() is polled.
  if (Vram* const gpu = vram_in_use_.load(std::memory_order_acquire); gpu && gpu->busy()) return false;
  return mailbox_->arm();
}

Result<void> SameHostBackend::send(Connection& peer, std::string_view message) {
  auto& connection = static_cast<PeerConnection&>(peer);
  constexpr std::size_t kMaxMessage = std::size_t{1} << 30;
  if (message.size() > kMaxMessage)
    return fail(Code::kInvalidArgument, "a message of %zu bytes; at most %zu are carried", message.size(), kMaxMessage);
  NIXL_TRY(connection.check_alive());
  connection.send(message);
  return {};
}

void SameHostBackend::drain(std::vector<Notification>& out) {
  mailbox_->drain(out);
  if (mailbox_->has_offers()) pull_offered();
  if (peers_->has_backlog()) peers_->push_backlogs();
}

// Measured on 2-core virtual machines: a call of 1.5 us, 0.25 us a piece, 10 GB/s; the spread between machines is
// large.
Result<CostEstimate> SameHostBackend::estimate(const Transfer& transfer) {
  const auto& sized = static_cast<const SizedTransfer&>(transfer);
  const std::uint64_t ns = 1500 + sized.num_blocks * 250 + sized.total_bytes / 10;
  const auto us = static_cast<std::int64_t>(ns / 1000 + 1);
  return CostEstimate{us, us / 2 + 1};
}

Probe probe() {
  Probe result;
  result.kinds = usable_kinds();
  if (const auto host = host_identity(); !host) {
    result.reason = host.error().reason + " (is /proc mounted?)";
    return result;
  }
  std::uint64_t from = 1, to = 0;
  iovec local{&to, sizeof to}, remote{&from, sizeof from};
  if (::process_vm_readv(::getpid(), &local, 1, &remote, 1, 0) != sizeof to) {
    result.reason =
        "process_vm_readv is refused: " + errno_text(errno) + " (allow it in the container's seccomp profile)";
    return result;
  }
  const Fd self(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)));
  if (!self) {
    result.reason = "pidfd_open is refused: " + errno_text(errno) + " (Linux 5.3 or newer, allowed by seccomp)";
    return result;
  }
  result.viable = true;
  return result;
}

}  // namespace
}  // namespace samehost

std::span<const BackendEntry> backends_of_samehost() {
  static const BackendEntry entry = [] {
    BackendEntry e;
    e.name = "SAME_HOST";
    e.params[samehost::HugePages::kParam] = "";
    e.list_params = false;
    e.kinds = {MemKind::kDram, MemKind::kVram};
    e.remote = e.local = e.notifications = true;
    e.stands_in_for = {"UCX", "UCX_MO", "LIBFABRIC"};
    e.off_env = "NIXL_SAME_HOST";
    e.off_param = "same_host";
    e.probe = samehost::probe;
    e.open = samehost::SameHostBackend::open;
    return e;
  }();
  return {&entry, 1};
}

}  // namespace nixl::core
