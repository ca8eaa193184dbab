#include "stores/etcd/etcd.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <list>
#include <map>
#include <mutex>
#include <thread>

#include "base/env.h"
#include "base/log.h"
#include "http/client.h"
#include "http/json.h"
#include "http/text.h"

namespace nixl::core {
namespace {

using http::Json;

constexpr Nanoseconds kSecond = 1'000'000'000;
constexpr Nanoseconds kRetryPause = kSecond / 4;
constexpr std::size_t kMaxLine = 64 << 20;

std::string coded(std::string_view bytes) {
  return "\"" + http::base64_encode(bytes) + "\"";
}
// The end of the range of all keys with this prefix.
std::string range_end(std::string prefix) {
  while (!prefix.empty() && static_cast<unsigned char>(prefix.back()) == 0xFF) prefix.pop_back();
  if (prefix.empty()) return std::string(1, '\0');
  ++prefix.back();
  return prefix;
}

struct Entry {
  std::string key, value;
  std::int64_t revision = 0;
};
struct Range {
  std::int64_t revision = 0;  // of the store when it answered
  std::vector<Entry> entries;
};

Result<Entry> read_entry(const Json& kv) {
  Entry entry;
  NIXL_ASSIGN(entry.key, http::base64_decode(kv["key"].text()));
  NIXL_ASSIGN(entry.value, http::base64_decode(kv["value"].text()));
  entry.revision = parse_int(kv["mod_revision"].text()).value_or(0);
  return entry;
}

class Etcd;

// One watch. Its stream runs on the HTTP thread; when it breaks, the store's own thread compares and starts it again.
class Watch final : public StoreWatch {
 public:
  Watch(Etcd& store, std::string prefix, std::function<void(const StoreEvent&)> callback)
      : store_(store), prefix_(std::move(prefix)), callback_(std::move(callback)) {}
  ~Watch() override;

  Result<void> begin();
  // After a lost stream: tells what changed meanwhile and listens again. False: try later.
  bool resume();

 private:
  Result<std::int64_t> compare(bool tell);
  void listen(std::int64_t from_revision);
  void take(std::string_view data);
  Result<void> take_line(std::string_view line);
  void start_over();  // ends the stream, which is then resumed
  void ended();

  Etcd& store_;
  const std::string prefix_;
  const std::function<void(const StoreEvent&)> callback_;
  std::map<std::string, std::int64_t> known_;  // key -> revision; one thread at a time: stream, or resume()
  std::string pending_;                        // a line not complete yet
  std::mutex mutex_;
  std::condition_variable idle_;
  http::CallId call_ = 0;
  bool streaming_ = false, stopped_ = false;
};

class Etcd final : public Store, private StoreWatcher {
 public:
  static Result<std::unique_ptr<Store>> open(StoreConfig config) {
    std::unique_ptr<Etcd> store(new Etcd(std::move(config)));
    std::string_view rest = store->config_.endpoint;
    while (!rest.empty()) {
      std::string url(rest.substr(0, rest.find(',')));
      rest.remove_prefix(std::min(rest.size(), url.size() + 1));
      std::erase(url, ' ');
      if (url.empty()) continue;
      if (url.find("://") == std::string::npos) url = "http://" + url;
      while (url.back() == '/') url.pop_back();
      NIXL_TRY(http::parse_url(url));
      store->urls_.push_back(url);
    }
    if (store->urls_.empty()) return fail(Code::kInvalidArgument, "etcd endpoint is empty: http://host:2379 is needed");
    http::ClientConfig client;
    client.connect_timeout_ns = store->config_.connect_timeout_ns;
    NIXL_ASSIGN(store->client_, http::Client::open(client));
    return store;
  }
  ~Etcd() override {
    if (::getpid() != owner_) {  // after a fork there is no thread to join
      if (thread_.joinable()) thread_.detach();
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    if (thread_.joinable()) thread_.join();
  }

  Result<void> publish(std::string_view key, std::string_view value) override {
    const std::lock_guard lock(publish_mutex_);
    if (config_.lease_ns == 0) return put(key, value);
    published_.insert_or_assign(std::string(key), std::string(value));
    auto done = put(key, value);
    if (!done) {  // put again until it succeeds, or it is withdrawn
      owes_ = true;
      start_thread();
    }
    return done;
  }

  Result<std::string> fetch(std::string_view key, Deadline deadline) override {
    NIXL_ASSIGN(const Range first, range(key, "", deadline));
    if (!first.entries.empty()) return first.entries.front().value;
    if (deadline.passed()) return missing(key);
    struct Found {
      std::mutex mutex;
      std::condition_variable there;
      std::optional<std::string> value;
    } found;
    Watch watch(*this, std::string(key), [&](const StoreEvent& event) {
      if (event.kind != StoreEvent::Kind::kPut || event.key != key) return;
      const std::lock_guard lock(found.mutex);
      found.value = event.value;
      found.there.notify_one();
    });
    NIXL_TRY(watch.begin());
    // It may have come between the first look and the watch.
    NIXL_ASSIGN(const Range second, range(key, "", deadline));
    if (!second.entries.empty()) return second.entries.front().value;
    std::unique_lock lock(found.mutex);
    while (!found.value && !deadline.passed())
      found.there.wait_for(lock, std::chrono::nanoseconds(std::min(deadline.left(), kSecond)));
    if (!found.value) return missing(key);
    return std::move(*found.value);
  }

  Result<void> withdraw(std::string_view key) override {
    const std::lock_guard lock(publish_mutex_);
    published_.erase(std::string(key));
    NIXL_TRY(ask("/v3/kv/deleterange", "{\"key\":" + coded(key) + "}", own_deadline()));
    return {};
  }
  Result<void> withdraw_prefix(std::string_view prefix) override {
    const std::lock_guard lock(publish_mutex_);
    std::erase_if(published_, [&](const auto& entry) { return entry.first.starts_with(prefix); });
    NIXL_TRY(ask("/v3/kv/deleterange",
                 "{\"key\":" + coded(prefix) + ",\"range_end\":" + coded(range_end(std::string(prefix))) + "}",
                 own_deadline()));
    return {};
  }

  StoreWatcher* watcher() noexcept override { return this; }
  Result<std::unique_ptr<StoreWatch>> watch(std::string_view prefix,
                                            std::function<void(const StoreEvent&)> callback) override {
    auto watch = std::make_unique<Watch>(*this, std::string(prefix), std::move(callback));
    NIXL_TRY(watch->begin());
    return watch;
  }

 private:
  friend class Watch;
  explicit Etcd(StoreConfig config) : config_(std::move(config)), owner_(::getpid()) {}

  Deadline own_deadline() const { return Deadline::after(config_.timeout_ns); }
  tl::unexpected<Error> missing(std::string_view key) const {
    return fail(Code::kTimeout, "etcd at %s: key \"%.*s\" did not appear", config_.endpoint.c_str(),
                static_cast<int>(key.size()), key.data());
  }
  std::string url(std::string_view path) const { return urls_[current_ % urls_.size()] + std::string(path); }

  // One request, tried at every endpoint, starting with the one that answered last. One that hangs uses up its share of the time.
  Result<Json> ask(std::string_view path, const std::string& body, Deadline deadline) {
    Error error;
    for (std::size_t attempt = 0; attempt < urls_.size(); ++attempt) {
      http::Call call;
      call.method = "POST";
      call.url = url(path);
      call.text_body = body;
      const auto share = deadline.left() / static_cast<Nanoseconds>(urls_.size() - attempt);
      call.deadline = deadline.earlier(Deadline::after(share));
      const http::Outcome outcome = client_->perform(std::move(call));
      if (!outcome.failed && outcome.reply.ok()) return Json::parse(outcome.reply.text);
      error = outcome.failed ? outcome.error
                             : Error{Code::kIo, url(path) + " answered HTTP " + std::to_string(outcome.reply.status) +
                                                    ": " + outcome.reply.text.substr(0, 300)};
      ++current_;
      if (deadline.passed()) break;
    }
    return fail(within("etcd at " + config_.endpoint, std::move(error)));
  }

  Result<Range> range(std::string_view key, std::string_view end, Deadline deadline) {
    std::string body = "{\"key\":" + coded(key);
    if (!end.empty()) body += ",\"range_end\":" + coded(end);
    const Deadline limit = deadline.passed() ? own_deadline() : deadline.earlier(own_deadline());
    NIXL_ASSIGN(const Json answer, ask("/v3/kv/range", body + "}", limit));
    Range range;
    range.revision = parse_int(answer["header"]["revision"].text()).value_or(0);
    for (const Json& kv : answer["kvs"].items()) {
      NIXL_ASSIGN(Entry entry, read_entry(kv));
      range.entries.push_back(std::move(entry));
    }
    return range;
  }

  // publish_mutex_ held. A lease that has run out unnoticed (we were stopped, or the server) is replaced.
  Result<void> put(std::string_view key, std::string_view value) {
    std::string body = "{\"key\":" + coded(key) + ",\"value\":" + coded(value);
    if (config_.lease_ns == 0) {
      NIXL_TRY(ask("/v3/kv/put", body + "}", own_deadline()));
      return {};
    }
    const bool old_lease = !lease_.empty();
    if (!old_lease) NIXL_TRY(grant());
    auto done = ask("/v3/kv/put", body + ",\"lease\":\"" + lease_ + "\"}", own_deadline());
    if (!done && old_lease && done.error().reason.find("lease not found") != std::string::npos) {
      lease_lost();
      NIXL_TRY(grant());
      done = ask("/v3/kv/put", body + ",\"lease\":\"" + lease_ + "\"}", own_deadline());
    }
    if (!done) return fail(std::move(done).error());
    return {};
  }
  void lease_lost() {
    lease_.clear();
    owes_ = true;  // the keys went with it
    start_thread();
  }
  Result<void> grant() {
    const std::int64_t seconds = std::max<std::int64_t>(1, (config_.lease_ns + kSecond - 1) / kSecond);
    NIXL_ASSIGN(const Json answer, ask("/v3/lease/grant", "{\"TTL\":" + std::to_string(seconds) + "}", own_deadline()));
    lease_ = answer["ID"].text();
    if (lease_.empty()) return fail(Code::kIo, "etcd at %s granted no lease", config_.endpoint.c_str());
    start_thread();
    return {};
  }
  // Renews the lease, and puts what the server lacks because it was away or the lease ran out.
  void renew() {
    const std::lock_guard lock(publish_mutex_);
    if (!lease_.empty()) {
      const auto answer = ask("/v3/lease/keepalive", "{\"ID\":\"" + lease_ + "\"}", own_deadline());
      if (!answer) return;  // unreachable: the next round tries again
      if (parse_int((*answer)["result"]["TTL"].text()).value_or(0) <= 0) lease_lost();
    }
    if (!owes_) return;
    for (const auto& [key, value] : published_)
      if (!put(key, value)) return;
    owes_ = false;
  }

  void start_thread() {
    const std::lock_guard lock(mutex_);
    if (!thread_.joinable()) thread_ = std::thread([this] { keep_house(); });
  }
  void keep_house() {
    const Nanoseconds period = config_.lease_ns > 0 ? std::max(config_.lease_ns / 3, kSecond / 3) : 3600 * kSecond;
    Deadline next_renewal = Deadline::after(period);
    std::unique_lock lock(mutex_);
    while (!stop_) {
      const Nanoseconds pause = broken_.empty() ? next_renewal.left() : std::min(next_renewal.left(), kRetryPause);
      const Deadline until = Deadline::after(pause);
      // A watch that broke shortens the wait; it is not resumed at once, so that a dead server is not asked in a loop.
      wake_.wait_for(lock, std::chrono::nanoseconds(until.left()),
                     [&] { return stop_ || (pause > kRetryPause && !broken_.empty()); });
      if (stop_) return;
      if (until.passed()) resume_broken(lock);
      if (!next_renewal.passed()) continue;
      lock.unlock();
      renew();
      lock.lock();
      next_renewal = Deadline::after(period);
    }
  }
  void resume_broken(std::unique_lock<std::mutex>& lock) {
    for (std::size_t left = broken_.size(); left > 0 && !broken_.empty() && !stop_; --left) {
      resuming_ = broken_.front();
      broken_.pop_front();
      lock.unlock();
      const bool resumed = resuming_->resume();
      lock.lock();
      if (!resumed) broken_.push_back(resuming_);
      resuming_ = nullptr;
      resumed_.notify_all();
    }
  }
  void broke(Watch* watch) {
    start_thread();
    const std::lock_guard lock(mutex_);
    broken_.push_back(watch);
    wake_.notify_all();
  }
  void forget(Watch* watch) {
    std::unique_lock lock(mutex_);
    resumed_.wait(lock, [&] { return resuming_ != watch; });
    broken_.remove(watch);
  }

  const StoreConfig config_;
  const pid_t owner_;
  std::vector<std::string> urls_;
  std::atomic<std::size_t> current_{0};
  std::mutex publish_mutex_;
  std::string lease_;
  std::map<std::string, std::string> published_;  // with the lease
  bool owes_ = false;                             // the server may lack some of them
  std::mutex mutex_;
  std::condition_variable wake_, resumed_;
  std::list<Watch*> broken_;
  Watch* resuming_ = nullptr;
  bool stop_ = false;
  std::thread thread_;
  std::unique_ptr<http::Client> client_;
};

Watch::~Watch() {
  {
    std::unique_lock lock(mutex_);
    stopped_ = true;
    if (streaming_) store_.client_->cancel(call_);
    idle_.wait(lock, [&] { return !streaming_; });
  }
  store_.forget(this);
}

Result<void> Watch::begin() {
  NIXL_ASSIGN(const std::int64_t revision, compare(/*tell=*/false));
  listen(revision + 1);
  return {};
}

bool Watch::resume() {
  const auto revision = compare(/*tell=*/true);
  if (!revision) return false;
  listen(*revision + 1);
  return true;
}

Result<std::int64_t> Watch::compare(bool tell) {
  NIXL_ASSIGN(const Range now,
              store_.range(prefix_.empty() ? std::string(1, '\0') : prefix_, range_end(prefix_), Deadline::never()));
  std::map<std::string, std::int64_t> seen;
  for (const Entry& entry : now.entries) seen[entry.key] = entry.revision;
  if (tell) {
    for (const auto& [key, revision] : known_)
      if (!seen.contains(key)) callback_({StoreEvent::Kind::kDelete, key, ""});
    for (const Entry& entry : now.entries) {
      const auto old = known_.find(entry.key);
      if (old == known_.end() || old->second != entry.revision)
        callback_({StoreEvent::Kind::kPut, entry.key, entry.value});
    }
  }
  known_ = std::move(seen);
  return now.revision;
}

void Watch::listen(std::int64_t from_revision) {
  pending_.clear();
  http::Call call;
  call.method = "POST";
  call.url = store_.url("/v3/watch");
  call.text_body = "{\"create_request\":{\"key\":" + coded(prefix_.empty() ? std::string(1, '\0') : prefix_) +
                   ",\"range_end\":" + coded(range_end(prefix_)) + ",\"start_revision\":\"" +
                   std::to_string(from_revision) + "\"}}";
  call.stall_ns = 0;
  call.on_data = [this](std::string_view data) { take(data); };
  const std::lock_guard lock(mutex_);
  if (stopped_) return;
  streaming_ = true;
  call_ = store_.client_->start(std::move(call), [this](const http::Outcome&) { ended(); });
}

void Watch::take(std::string_view data) {
  pending_ += data;
  if (pending_.size() > kMaxLine) return start_over();
  std::size_t begin = 0;
  for (std::size_t end; (end = pending_.find('\n', begin)) != std::string::npos; begin = end + 1)
    if (const auto taken = take_line(std::string_view(pending_).substr(begin, end - begin)); !taken) {
      NIXL_WARN("etcd at %s, watch of \"%s\" starts over: %s", store_.config_.endpoint.c_str(), prefix_.c_str(),
                taken.error().reason.c_str());
      return start_over();  // what the line told is found by comparing
    }
  pending_.erase(0, begin);
}

Result<void> Watch::take_line(std::string_view line) {
  NIXL_ASSIGN(const Json message, Json::parse(line));
  if (message.has("error") || message["result"]["canceled"].text() == "true") {  // for one: the revision was compacted
    start_over();
    return {};
  }
  for (const Json& event : message["result"]["events"].items()) {
    NIXL_ASSIGN(Entry entry, read_entry(event["kv"]));
    const bool removed = event["type"].text() == "DELETE";
    if (removed)
      known_.erase(entry.key);
    else
      known_[entry.key] = entry.revision;
    {
      const std::lock_guard lock(mutex_);
      if (stopped_) return {};
    }
    callback_({removed ? StoreEvent::Kind::kDelete : StoreEvent::Kind::kPut, entry.key, removed ? "" : entry.value});
  }
  return {};
}

void Watch::start_over() {
  const std::lock_guard lock(mutex_);
  store_.client_->cancel(call_);
}

void Watch::ended() {
  const std::lock_guard lock(mutex_);
  // Before the destructor may go on: it waits for this flag under the same lock.
  if (!stopped_) store_.broke(this);
  streaming_ = false;
  idle_.notify_all();
}

}  // namespace

const StoreEntry& store_etcd() {
  static const StoreEntry kEntry{"etcd", &Etcd::open};
  return kEntry;
}

}  // namespace nixl::core
