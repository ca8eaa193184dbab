#include "agent/exchange.h"

#include <sys/socket.h>

#include <algorithm>
#include <deque>
#include <map>
#include <mutex>
#include <set>

#include "agent/catalog.h"
#include "agent/listener.h"
#include "agent/seal.h"
#include "agent/settings.h"
#include "agent/workers.h"
#include "base/log.h"
#include "net/tcp.h"

namespace nixl::core {
namespace {

constexpr Nanoseconds kConnectTime = 1'000'000'000;
constexpr Nanoseconds kBodyTime = 5'000'000'000;
constexpr Nanoseconds kSlice = 200'000'000;            // how soon a waiting job notices that the agent goes
constexpr Nanoseconds kOperationTime = 3'000'000'000;  // an agent is gone within five seconds, also beside a dead store
constexpr Nanoseconds kLease = 10'000'000'000;
constexpr Nanoseconds kWarnEvery = 10'000'000'000;
constexpr const char* kFullLabel = "metadata";

std::string address(const std::string& ip, std::uint16_t port) {
  return net::to_text({ip, port});
}

// The store an agent is configured with, and how its keys are spelt.
struct StoreChoice {
  std::unique_ptr<Store> store;
  std::string endpoint;
  bool etcd = false;
  std::string name_space;

  std::string key(const std::string& agent, const std::string& label) const {
    if (etcd) return name_space + "/" + agent + "/" + label;
    return "/nixl/agents/" + label + "/" + agent + "/NULL_AGENT";
  }
  // As a publisher with another spelling of the namespace would have written it.
  std::string other_key(const std::string& agent, const std::string& label) const {
    if (!etcd) return "";
    if (name_space.ends_with('/')) return name_space + agent + "/" + label;
    return name_space + "//" + agent + "/" + label;
  }
};

Result<StoreChoice> open_store(const Settings& settings, std::optional<bool> use_etcd, Catalog& catalog) {
  StoreChoice choice;
  const auto etcd = use_etcd.value_or(true) ? settings.text("NIXL_ETCD_ENDPOINTS") : std::nullopt;
  const auto tcp = settings.text("NIXL_TCPSTORE_ENDPOINT");
  if (use_etcd.value_or(false) && !etcd)
    return fail(Code::kNotAllowed, "use_etcd=True needs the variable NIXL_ETCD_ENDPOINTS, e.g. http://localhost:2379");
  if (etcd && tcp)
    return fail(Code::kNotAllowed,
                "NIXL_ETCD_ENDPOINTS and NIXL_TCPSTORE_ENDPOINT are both set; one store is possible");
  if (!etcd && !tcp) return choice;
  choice.etcd = etcd.has_value();
  choice.endpoint = etcd ? *etcd : *tcp;
  choice.name_space = settings.text("NIXL_ETCD_NAMESPACE").value_or("/nixl/agents/");
  StoreConfig config;
  config.endpoint = choice.endpoint;
  if (etcd) {
    config.lease_ns = kLease;
    config.timeout_ns = kOperationTime;
  } else {
    NIXL_ASSIGN(const auto connect_ms, settings.number("NIXL_TCPSTORE_TIMEOUT_MS"));
    NIXL_ASSIGN(const auto op_ms, settings.number("NIXL_TCPSTORE_OP_TIMEOUT_MS"));
    config.connect_timeout_ns = connect_ms.value_or(30'000) * 1'000'000;
    config.timeout_ns = op_ms.value_or(5'000) * 1'000'000;
  }
  const char* name = etcd ? "etcd" : "tcp";
  const StoreEntry* entry = catalog.store(name);
  if (!entry)
    return fail(Code::kUnsupported, "%s is set, but this build has no %s store",
                etcd ? "NIXL_ETCD_ENDPOINTS" : "NIXL_TCPSTORE_ENDPOINT", name);
  NIXL_ASSIGN(choice.store, entry->open(std::move(config)));
  return choice;
}

class ExchangeImpl final : public Exchange {
 public:
  ExchangeImpl(Hooks hooks, StoreChoice store, std::string secret, Nanoseconds watch_timeout, bool discovers)
      : hooks_(std::move(hooks)),
        store_(std::move(store)),
        secret_(std::move(secret)),
        watch_timeout_(watch_timeout),
        discovers_(discovers) {}
  ~ExchangeImpl() override { close(); }

  Result<void> listen(std::uint16_t port) {
    NIXL_ASSIGN(listener_, Listener::open(port, secret_, hooks_));
    return {};
  }
  std::uint16_t port() const noexcept override { return listener_ ? listener_->port() : 0; }
  bool has_store() const noexcept override { return store_.store != nullptr; }
  bool discovers() const noexcept override { return discovers_; }

  void send(const std::string& ip, std::uint16_t port, std::string bytes) override {
    run("metadata was not delivered", ip, port,
        [this, ip, port, frame = encode_frame(Verb::kLoad, bytes)] { return talk(ip, port, frame, nullptr); });
  }
  void fetch(const std::string& ip, std::uint16_t port, const std::string& agent) override {
    run("metadata was not fetched", ip, port, [this, ip, port, agent]() -> Result<void> {
      Frame reply;
      NIXL_TRY(talk(ip, port, encode_frame(Verb::kSend, ""), &reply));
      if (reply.verb != Verb::kLoad) return fail(Code::kMismatch, "the answer is not metadata");
      NIXL_ASSIGN(const std::string name, hooks_.name_in(reply.body));
      if (name != agent)
        return fail(Code::kMismatch, "the answer is of agent '%s', agent '%s' was asked for", name.c_str(),
                    agent.c_str());
      NIXL_TRY(hooks_.load(reply.body));
      return {};
    });
  }
  void invalidate(const std::string& ip, std::uint16_t port) override {
    run("the invalidation was not delivered", ip, port,
        [this, ip, port, frame = encode_frame(Verb::kInvalidate, hooks_.agent)] {
          return talk(ip, port, frame, nullptr);
        });
  }

  void publish(const std::string& label, std::uint64_t revision, std::string bytes) override {
    bool wait = false;
    {
      const std::lock_guard lock(mutex_);
      if (store_.etcd && !published_.count("")) pending_[""] = {};
      Pending& next = pending_[label];
      if (next.revision <= revision) next = {revision, std::move(bytes)};
      wait = discovers_ && now_ns() >= quiet_until_;
    }
    if (wait)
      publish_pending();  // who registers and then tells a peer of it, by whatever way, finds the peer able to discover it
    else
      workers_.run([this] { publish_pending(); });
  }
  void fetch_stored(const std::string& agent, const std::string& label) override {
    {
      const std::lock_guard lock(mutex_);
      if (!fetching_.insert({agent, label}).second) return;
    }
    workers_.run([this, agent, label] {
      if (auto done = fetch_and_load(agent, label); !done && !workers_.stopping()) warn(done.error());
      const std::lock_guard lock(mutex_);
      fetching_.erase({agent, label});
    });
  }
  Result<void> fetch_now(const std::string& agent) override {
    auto done = fetch_and_load(agent, "");
    if (!done && done.error().code == Code::kTimeout) return fail(Code::kNotFound, "%s", done.error().reason.c_str());
    return done;
  }
  // Also what an earlier life of this agent has left.
  void withdraw() override {
    workers_.run([this] {
      auto done = withdraw_all();
      if (done && store_.etcd) done = store_.store->withdraw_prefix(store_.key(hooks_.agent, ""));
      if (!done) warn(done.error());
    });
  }
  void close() noexcept override {
    workers_.stop();
    listener_.reset();
    if (store_.store && discovers_)
      if (auto done = withdraw_all(); !done) warn(done.error());
    std::map<std::string, std::unique_ptr<StoreWatch>> watches;
    {
      const std::lock_guard lock(mutex_);
      watches.swap(watches_);
    }
    watches.clear();
    store_.store.reset();
  }

 private:
  template <typename Job>
  void run(const char* what, const std::string& ip, std::uint16_t port, Job job) {
    workers_.run([this, what, ip, port, job = std::move(job)] {
      if (auto done = job(); !done && !workers_.stopping())
        NIXL_WARN("agent %s: %s (%s): %s", hooks_.agent.c_str(), what, address(ip, port).c_str(),
                  done.error().reason.c_str());
    });
  }

  Result<void> wait(int fd, short events, Deadline deadline) {
    for (;;) {
      pollfd entry{fd, events, 0};
      NIXL_ASSIGN(const bool ready, net::wait_any({&entry, 1}, Deadline::after(kSlice).earlier(deadline)));
      if (ready) return {};
      if (workers_.stopping()) return fail(Code::kCancelled, "the agent goes");
      if (deadline.passed())
        return fail(Code::kTimeout, "no %s within the time allowed", events == POLLIN ? "answer" : "room to send");
    }
  }

  // Sends one frame; reads one back when `reply` is given.
  Result<void> talk(const std::string& ip, std::uint16_t port, const std::string& frame, Frame* reply) {
    NIXL_ASSIGN(const Fd socket, net::connect_tcp({ip, port}, Deadline::after(kConnectTime)));
    std::optional<Seal> seal;
    if (!secret_.empty()) {
      NIXL_ASSIGN(Seal greeted, greet(socket));
      seal.emplace(std::move(greeted));
    }
    NIXL_TRY(send_all(socket, seal ? seal->close(frame) : frame));
    if (!reply) {
      shutdown(socket.get(), SHUT_WR);
      return {};
    }
    NIXL_ASSIGN(*reply, receive(socket));
    if (seal) {
      NIXL_ASSIGN(*reply, seal->open(*reply));
    }
    return {};
  }

  Result<Seal> greet(const Fd& socket) {
    const std::string ours = Seal::nonce();
    NIXL_TRY(send_all(socket, encode_frame(Verb::kHello, ours)));
    const auto hello = receive(socket);
    if (!hello) return fail(within("NIXL_LISTEN_SECRET is set here and may not be there", hello.error()));
    if (hello->verb != Verb::kHello || hello->body.size() != Seal::kNonceBytes)
      return fail(Code::kMismatch, "the listener does not answer to NIXL_LISTEN_SECRET");
    return Seal(secret_, Seal::Side::kCaller, ours, hello->body);
  }

  Result<void> send_all(const Fd& socket, const std::string& bytes) {
    std::size_t written = 0;
    while (written < bytes.size()) {
      const ssize_t sent =
          ::send(socket.get(), bytes.data() + written, bytes.size() - written, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)
        return fail(errno_error("send", errno));
      if (sent > 0)
        written += static_cast<std::size_t>(sent);
      else
        NIXL_TRY(wait(socket.get(), POLLOUT, Deadline::after(kBodyTime)));
    }
    return {};
  }

  Result<Frame> receive(const Fd& socket) {
    FrameReader input;
    std::vector<char> buffer(256 << 10);
    const Deadline deadline = Deadline::after(kBodyTime);
    for (;;) {
      NIXL_TRY(wait(socket.get(), POLLIN, deadline));
      const ssize_t got = recv(socket.get(), buffer.data(), buffer.size(), MSG_DONTWAIT);
      if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) continue;
      if (got < 0) return fail(errno_error("recv", errno));
      if (got == 0) return fail(Code::kPeerLost, "the connection was closed before the answer was whole");
      input.append(buffer.data(), static_cast<std::size_t>(got));
      NIXL_ASSIGN(auto frame, input.next());
      if (frame) return std::move(*frame);
    }
  }

  void publish_pending() {
    const std::lock_guard one_at_a_time(publish_mutex_);
    std::map<std::string, Pending> pending;
    {
      const std::lock_guard lock(mutex_);
      pending.swap(pending_);
      std::erase_if(pending, [this](const auto& item) {
        const auto there = published_.find(item.first);
        return there != published_.end() && there->second > item.second.revision;
      });
    }
    for (const auto& [label, next] : pending) {
      if (auto done = store_.store->publish(store_.key(hooks_.agent, label), next.bytes); !done) {
        warn(done.error());
        continue;
      }
      const std::lock_guard lock(mutex_);
      published_[label] = next.revision;
    }
  }

  Result<void> withdraw_all() {
    const std::lock_guard one_at_a_time(publish_mutex_);
    std::map<std::string, std::uint64_t> labels;
    {
      const std::lock_guard lock(mutex_);
      labels.swap(published_);
      pending_.clear();
    }
    for (const auto& [label, revision] : labels)  // a store that fails once is not waited for again
      NIXL_TRY(store_.store->withdraw(store_.key(hooks_.agent, label)));
    return {};
  }

  Result<std::string> fetch_value(const std::string& agent, const std::string& label, Deadline deadline) {
    const std::string other = store_.other_key(agent, label);
    for (;;) {
      if (!other.empty())
        if (auto value = store_.store->fetch(other, Deadline::passed_already()); value && !value->empty()) return value;
      auto value = store_.store->fetch(store_.key(agent, label), Deadline::after(kSlice).earlier(deadline));
      if (value || value.error().code != Code::kTimeout) return value;
      if (workers_.stopping()) return fail(Code::kCancelled, "the agent goes");
      if (deadline.passed())
        return fail(Code::kTimeout, "agent '%s' did not appear in %s within %lld ms (key %s)", agent.c_str(),
                    store_.endpoint.c_str(), static_cast<long long>(watch_timeout_ / 1'000'000),
                    store_.key(agent, label).c_str());
    }
  }

  // Watches first, so that no change after the value that is fetched goes unseen. A value that was taken back while it was
  // fetched is none.
  Result<void> fetch_and_load(const std::string& agent, const std::string& label) {
    const bool fresh = watch(agent);
    const Deadline deadline = Deadline::after(watch_timeout_);
    Seen& seen = seen_of(agent);
    for (;;) {
      const std::uint64_t removals = removals_of(seen);
      const auto bytes = fetch_value(agent, label.empty() ? kFullLabel : label, deadline);
      if (!bytes) {
        if (fresh) unwatch(agent);
        return fail(bytes.error());
      }
      const std::lock_guard applying(seen.applying);
      if (removals_of(seen) != removals) continue;
      NIXL_ASSIGN(const std::string name, hooks_.load(*bytes));
      if (name != agent)
        NIXL_WARN("agent %s: the key of agent '%s' holds metadata of '%s'", hooks_.agent.c_str(), agent.c_str(),
                  name.c_str());
      return {};
    }
  }

  struct Pending {
    std::uint64_t revision = 0;
    std::string bytes;
  };

  bool watch(const std::string& agent) {  // false: watched already, or not possible
    StoreWatcher* watcher = store_.store->watcher();
    {
      const std::lock_guard lock(mutex_);
      if (!watcher || watches_.count(agent)) return false;
      watches_[agent] = nullptr;  // being made
    }
    auto made =
        watcher->watch(store_.key(agent, ""), [this, agent](const StoreEvent& event) { changed(agent, event); });
    if (!made) warn(made.error());
    const std::lock_guard lock(mutex_);
    if (made)
      watches_[agent] = std::move(*made);
    else
      watches_.erase(agent);
    return made.has_value();
  }
  void unwatch(const std::string& agent) {
    std::unique_ptr<StoreWatch> gone;  // destroyed outside the lock: it waits for its callback
    const std::lock_guard lock(mutex_);
    if (const auto found = watches_.find(agent); found != watches_.end()) {
      gone = std::move(found->second);
      watches_.erase(found);
    }
  }
  // What the store tells of a peer is applied in the order in which it is told.
  struct Seen {
    std::mutex applying;  // taken before mutex_
    std::deque<StoreEvent> news;
    std::uint64_t removals = 0;
  };
  Seen& seen_of(const std::string& agent) {
    const std::lock_guard lock(mutex_);
    return seen_[agent];
  }
  std::uint64_t removals_of(const Seen& seen) {
    const std::lock_guard lock(mutex_);
    return seen.removals;
  }
  void changed(const std::string& agent, const StoreEvent& event) {
    if (event.kind == StoreEvent::Kind::kPut && event.value.empty()) return;
    {
      const std::lock_guard lock(mutex_);
      Seen& seen = seen_[agent];
      seen.news.push_back(event);
      seen.removals += event.kind == StoreEvent::Kind::kDelete;
    }
    workers_.run([this, agent] { apply_oldest(agent); });
  }
  void apply_oldest(const std::string& agent) {
    Seen& seen = seen_of(agent);
    const std::lock_guard applying(seen.applying);
    StoreEvent event;
    {
      const std::lock_guard lock(mutex_);
      event = std::move(seen.news.front());
      seen.news.pop_front();
    }
    if (event.kind == StoreEvent::Kind::kDelete)
      hooks_.remove(agent);
    else if (auto name = hooks_.load(event.value); !name)
      warn(name.error());
  }

  void warn(const Error& error) {
    const std::lock_guard lock(mutex_);
    if (now_ns() < quiet_until_) return;
    quiet_until_ = now_ns() + kWarnEvery;
    NIXL_WARN("agent %s: store %s: %s", hooks_.agent.c_str(), store_.endpoint.c_str(), error.reason.c_str());
  }

  const Hooks hooks_;
  StoreChoice store_;
  const std::string secret_;  // NIXL_LISTEN_SECRET; empty: none
  const Nanoseconds watch_timeout_;
  const bool discovers_;
  std::mutex publish_mutex_;
  std::mutex mutex_;                                // all below
  std::map<std::string, Pending> pending_;          // by label
  std::map<std::string, std::uint64_t> published_;  // by label: the revision
  std::set<std::pair<std::string, std::string>> fetching_;
  std::map<std::string, std::unique_ptr<StoreWatch>> watches_;
  std::map<std::string, Seen> seen_;  // by peer; stays
  Nanoseconds quiet_until_ = 0;
  Workers workers_{16};
  std::unique_ptr<Listener> listener_;
};

}  // namespace

Result<std::unique_ptr<Exchange>> Exchange::open(Hooks hooks, Options options, const Settings& settings,
                                                 Catalog& catalog) {
  NIXL_ASSIGN(StoreChoice store, open_store(settings, options.use_etcd, catalog));
  NIXL_ASSIGN(const auto watch_us, settings.number("NIXL_ETCD_WATCH_TIMEOUT"));
  if (watch_us && *watch_us < 0)
    return fail(Code::kInvalidArgument, "NIXL_ETCD_WATCH_TIMEOUT is %lld; microseconds, 0 or more, are needed",
                static_cast<long long>(*watch_us));
  if (watch_us) options.watch_timeout_ns = *watch_us * 1000;
  const bool discovers = options.use_etcd.value_or(false);
  auto exchange = std::make_unique<ExchangeImpl>(std::move(hooks), std::move(store),
                                                 settings.text("NIXL_LISTEN_SECRET").value_or(""),
                                                 options.watch_timeout_ns, discovers);
  if (options.listen) NIXL_TRY(exchange->listen(options.port));
  return std::unique_ptr<Exchange>(std::move(exchange));
}

}  // namespace nixl::core
