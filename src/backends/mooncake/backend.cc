#include "backends/mooncake/backend.h"

#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>

#include "backends/mooncake/transfer.h"

namespace nixl::core::mooncake {
namespace {

constexpr long kLookAgain_ns = 50'000;  // the engine tells nobody of what has ended

bool is_memory(MemKind kind) {
  return kind == MemKind::kDram || kind == MemKind::kVram;
}

Result<void> add_to(int epoll, int fd) {
  epoll_event event{};
  event.events = EPOLLIN;
  if (::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) != 0) return fail(errno_error("epoll_ctl", errno));
  return {};
}

}  // namespace

MooncakeBackend::MooncakeBackend(BackendConfig config, EngineOptions options, KindSet kinds, net::Wakeup news)
    : config_(std::move(config)),
      options_(std::move(options)),
      abilities_{.local_kinds = kinds, .remote_kinds = kinds, .remote = true, .local = true},
      news_(std::move(news)) {}

Result<std::unique_ptr<Backend>> MooncakeBackend::open(BackendConfig config, const Api& api, EngineOptions options,
                                                       KindSet kinds) {
  NIXL_ASSIGN(net::Wakeup news, net::Wakeup::open());
  std::unique_ptr<MooncakeBackend> backend(
      new MooncakeBackend(std::move(config), std::move(options), kinds, std::move(news)));
  NIXL_TRY(backend->start(api));
  return backend;
}

Result<void> MooncakeBackend::start(const Api& api) {
  timer_ = Fd(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  if (!timer_) return fail(errno_error("timerfd_create", errno));
  events_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
  if (!events_) return fail(errno_error("epoll_create1", errno));
  NIXL_TRY(add_to(events_.get(), timer_.get()));
  NIXL_TRY(add_to(events_.get(), news_.fd()));
  NIXL_ASSIGN(engine_, Engine::open(api, options_));
  parts_ = std::make_unique<Parts>(*engine_);
  NIXL_ASSIGN(office_, PostOffice::open(options_.address, config_.self.incarnation, news_));
  return {};
}

MooncakeBackend::~MooncakeBackend() = default;

Result<std::unique_ptr<LocalRegion>> MooncakeBackend::add_region(const Region& region) {
  if (!abilities_.local_kinds.has(region.kind))
    return fail(Code::kInvalidArgument, "Mooncake does not take %s here", name(region.kind));
  NIXL_ASSIGN(Cuts cuts, parts_->add(region));
  return std::make_unique<OwnRegion>(*parts_, std::move(cuts));
}

Result<std::string> MooncakeBackend::export_region(const LocalRegion& region) {
  return static_cast<const OwnRegion&>(region).cuts.encode();
}

Result<std::unique_ptr<RemoteRegion>> MooncakeBackend::import_region(Connection& peer, const Region& region,
                                                                     std::string_view key) {
  if (!is_memory(region.kind))
    return fail(Code::kInvalidArgument, "Mooncake does not reach %s of a peer", name(region.kind));
  NIXL_ASSIGN(Cuts cuts, Cuts::decode(key, region));
  static_cast<Line&>(peer).refresh();
  return std::make_unique<PeerRegion>(std::move(cuts));
}

Result<std::string> MooncakeBackend::export_connection() {
  return Contact{config_.self.incarnation, options_.address, office_->port(), engine_->name(), options_.protocol}
      .encode();
}

Result<std::unique_ptr<Connection>> MooncakeBackend::connect(const PeerId& peer, std::string_view bytes) {
  NIXL_ASSIGN(Contact contact, Contact::decode(bytes));
  if (contact.protocol != options_.protocol)
    return fail(Code::kUnsupported, "agent '%s' uses Mooncake over %s, this one over %s (parameter protocol)",
                peer.name.c_str(), contact.protocol.c_str(), options_.protocol.c_str());
  const Line::Owner owner{*engine_, *office_, config_.self, config_.events, news_};
  if (peer.name == config_.self.name && contact.incarnation == config_.self.incarnation)
    return Line::open_to_self(owner);
  return Line::open(owner, peer, std::move(contact));
}

Result<std::unique_ptr<Transfer>> MooncakeBackend::prepare(Plan plan) {
  if (!abilities_.local_kinds.has(plan.local_kind) || !is_memory(plan.remote_kind))
    return fail(Code::kInvalidArgument, "Mooncake moves DRAM_SEG and, built with CUDA, VRAM_SEG; not %s to %s here",
                name(plan.local_kind), name(plan.remote_kind));
  merge_neighbours(plan);
  return std::make_unique<MooncakeTransfer>(*this, std::move(plan));
}

bool MooncakeBackend::progress() noexcept {
  news_.clear();
  std::uint64_t expirations;
  (void)!::read(timer_.get(), &expirations, sizeof expirations);
  const std::lock_guard lock(mutex_);
  free_abandoned_locked();
  return advance_all_locked();
}

bool MooncakeBackend::advance_all_locked() {
  bool any = false;
  for (std::size_t i = 0; i < running_.size();) {
    MooncakeTransfer* const transfer = running_[i];
    any |= transfer->advance_locked();
    if (i < running_.size() && running_[i] == transfer) ++i;  // it has not ended
  }
  return any;
}

void MooncakeBackend::free_abandoned_locked() {
  std::string ignored;
  for (Abandoned& batch : abandoned_) {
    while (batch.next < batch.count && engine_->poll(batch.batch, batch.next, ignored) != TaskState::kRunning)
      ++batch.next;
    if (batch.next == batch.count) engine_->free_batch(batch.batch);
  }
  std::erase_if(abandoned_, [](const Abandoned& batch) { return batch.next == batch.count; });
}

bool MooncakeBackend::arm() noexcept {
  const std::lock_guard lock(mutex_);
  itimerspec soon{};
  soon.it_value.tv_nsec = running_.empty() ? 0 : kLookAgain_ns;
  ::timerfd_settime(timer_.get(), 0, &soon, nullptr);
  return office_->empty();
}

Result<void> MooncakeBackend::send(Connection& peer, std::string_view message) {
  return static_cast<Line&>(peer).send(message);
}

void MooncakeBackend::drain(std::vector<Notification>& out) {
  office_->drain(out);
}

}  // namespace nixl::core::mooncake
