#include "agent/prometheus.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

#include "agent/metrics_page.h"
#include "agent/settings.h"
#include "base/env.h"
#include "base/log.h"
#include "net/local.h"
#include "net/tcp.h"
#include "net/wait.h"

namespace nixl::core {
namespace {

constexpr Nanoseconds kGuestTime = 10'000'000'000;  // as long as a scrape usually may take
constexpr Nanoseconds kPauseWithoutDescriptors = 10'000'000;
constexpr std::size_t kMostGuests = 64, kMostRequestBytes = 16384;

// Answers every HTTP request with one text; a slow guest holds up nobody.
class PageServer {
 public:
  explicit PageServer(std::function<std::string()> text) : text_(std::move(text)) {}
  ~PageServer() {
    stopping_ = true;
    if (wakeup_) wakeup_->wake();
    if (thread_.joinable()) thread_.join();
  }
  Result<void> serve(const net::Endpoint& at) {
    NIXL_ASSIGN(socket_, net::listen_tcp(at));
    NIXL_ASSIGN(const net::Endpoint here, net::local_endpoint(socket_.get()));
    NIXL_INFO("telemetry is served on http port %u", here.port);
    NIXL_ASSIGN(net::Wakeup wakeup, net::Wakeup::open());
    wakeup_ = std::make_unique<net::Wakeup>(std::move(wakeup));
    thread_ = std::thread([this] { loop(); });
    return {};
  }

 private:
  // One request a connection; its text does not matter beyond its end.
  struct Guest {
    Fd socket;
    Deadline patience = Deadline::after(kGuestTime);
    std::string request, reply;
    std::size_t written = 0;
    bool over = false;
  };

  void loop() {
    std::vector<pollfd> waits;
    while (!stopping_) {
      waits.assign({{wakeup_->fd(), POLLIN, 0}, {guests_.size() < kMostGuests ? socket_.get() : -1, POLLIN, 0}});
      Deadline deadline = Deadline::never();
      for (const Guest& guest : guests_) {
        waits.push_back({guest.socket.get(), static_cast<short>(guest.reply.empty() ? POLLIN : POLLOUT), 0});
        deadline = deadline.earlier(guest.patience);
      }
      if (!net::wait_any(waits, deadline)) return;
      for (std::size_t i = 2; i < waits.size(); ++i) {
        Guest& guest = guests_[i - 2];
        if (waits[i].revents) guest.reply.empty() ? read(guest) : write(guest);
        if (guest.patience.passed()) guest.over = true;
      }
      std::erase_if(guests_, [](const Guest& guest) { return guest.over; });
      if (waits[1].revents) accept();
    }
  }
  void accept() {
    auto socket = net::accept_connection(socket_.get());
    if (socket)
      guests_.push_back({std::move(*socket)});
    else if (socket.error().code != Code::kAgain)  // no descriptors left: the caller stays in the queue
      (void)net::wait_any({}, Deadline::after(kPauseWithoutDescriptors));
  }
  void read(Guest& guest) {
    char buffer[2048];
    const ssize_t got = recv(guest.socket.get(), buffer, sizeof buffer, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (got > 0) guest.request.append(buffer, static_cast<std::size_t>(got));
    guest.over = got <= 0 || guest.request.size() > kMostRequestBytes;
    if (guest.over || guest.request.find("\r\n\r\n") == std::string::npos) return;
    const std::string body = text_();
    guest.reply =
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nConnection: close\r\nContent-Length: " +
        std::to_string(body.size()) + "\r\n\r\n" + body;
    write(guest);
  }
  void write(Guest& guest) {
    const ssize_t sent = send(guest.socket.get(), guest.reply.data() + guest.written,
                              guest.reply.size() - guest.written, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (sent > 0) guest.written += static_cast<std::size_t>(sent);
    guest.over = sent <= 0 || guest.written == guest.reply.size();
  }

  const std::function<std::string()> text_;
  Fd socket_;
  std::vector<Guest> guests_;
  std::unique_ptr<net::Wakeup> wakeup_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

// NIXL_TELEMETRY_PROMETHEUS_PORT and _LOCAL. A busy port is a warning: counting goes on, nobody can read it.
Result<void> serve(PageServer& server, const Settings& settings, const std::string& agent) {
  NIXL_ASSIGN(const auto port, settings.number("NIXL_TELEMETRY_PROMETHEUS_PORT"));
  NIXL_ASSIGN(const auto local, settings.flag("NIXL_TELEMETRY_PROMETHEUS_LOCAL"));
  if (port && (*port < 0 || *port > 65535))
    return fail(Code::kInvalidArgument, "NIXL_TELEMETRY_PROMETHEUS_PORT is %lld; 0 to 65535 are allowed",
                static_cast<long long>(*port));
  const net::Endpoint at{local.value_or(false) ? "127.0.0.1" : "", static_cast<std::uint16_t>(port.value_or(9090))};
  if (auto served = server.serve(at); !served)
    NIXL_WARN("agent %s: telemetry cannot be read on port %u: %s", agent.c_str(), at.port,
              served.error().reason.c_str());
  return {};
}

class Prometheus final : public TelemetrySink {
 public:
  explicit Prometheus(MetricsPage page) : page_(std::move(page)) {}
  void add(const Event* events, std::size_t count) override {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < count; ++i) page_.add(events[i]);
  }
  std::string text() const {
    const std::lock_guard lock(mutex_);
    return page_.text();
  }

 private:
  mutable std::mutex mutex_;
  MetricsPage page_;

 public:
  PageServer server{[this] { return text(); }};  // last: its thread uses the others
};

// One file an agent in a directory that all processes share; the process of rank 0 serves them as one page.
class SharedPages final : public TelemetrySink {
 public:
  struct Place {
    std::string directory, file;
    std::int64_t interval_ms = 100, stale_s = 30;
  };
  SharedPages(MetricsPage page, Place place) : page_(std::move(page)), place_(std::move(place)) {}
  ~SharedPages() override {
    if (!thread_.joinable()) return;
    stopping_ = true;
    wakeup_->wake();
    thread_.join();
    (void)write();  // the last figures; the file goes stale by itself
  }
  Result<void> start() {
    mkdir(place_.directory.c_str(), 0755);
    NIXL_TRY(write());
    NIXL_ASSIGN(net::Wakeup wakeup, net::Wakeup::open());
    wakeup_ = std::make_unique<net::Wakeup>(std::move(wakeup));
    thread_ = std::thread([this] { loop(); });
    return {};
  }
  void add(const Event* events, std::size_t count) override {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < count; ++i) page_.add(events[i]);
    changed_ = true;
  }
  // Pages of all processes that wrote lately; files of the others are removed.
  std::string all() {
    (void)write();
    std::vector<std::string> pages;
    std::error_code error;
    for (const auto& file : std::filesystem::directory_iterator(place_.directory, error)) {
      struct stat about {};
      if (file.path().extension() != ".prom" || stat(file.path().c_str(), &about) != 0) continue;
      if (is_stale(file.path().filename(), about.st_mtim)) {
        unlink(file.path().c_str());
        continue;
      }
      std::ostringstream text;
      text << std::ifstream(file.path()).rdbuf();
      pages.push_back(text.str());
    }
    std::sort(pages.begin(), pages.end());
    return merge_pages(pages);
  }

 private:
  // By how long it has not changed, so that a clock that jumps makes nobody look dead; only of a file never seen before its own
  // time counts. On the server's thread.
  bool is_stale(const std::string& name, const timespec& written) {
    const Nanoseconds stale_ns = place_.stale_s * 1'000'000'000, now = now_ns();
    const auto [entry, is_new] = seen_.try_emplace(name);
    Seen& seen = entry->second;
    if (is_new) {
      const std::int64_t age_s = std::clamp<std::int64_t>(std::time(nullptr) - written.tv_sec, 0, place_.stale_s + 1);
      seen = {written, now - age_s * 1'000'000'000};
    } else if (written.tv_sec != seen.written.tv_sec || written.tv_nsec != seen.written.tv_nsec) {
      seen = {written, now};
    }
    if (now - seen.since <= stale_ns) return false;
    seen_.erase(entry);
    return true;
  }

  void loop() {
    const Nanoseconds sign_of_life = std::max<std::int64_t>(place_.stale_s * 1'000'000'000 / 3, 1);
    Nanoseconds written = now_ns();
    while (!stopping_) {
      pollfd wait{wakeup_->fd(), POLLIN, 0};
      if (!net::wait_any({&wait, 1}, Deadline::after(place_.interval_ms * 1'000'000))) return;
      if (!changed_ && now_ns() - written < sign_of_life) continue;
      written = now_ns();
      if (auto done = write(); !done) NIXL_WARN("telemetry: %s", done.error().reason.c_str());
    }
  }
  // Under another name first: a reader sees a whole page or the one before.
  Result<void> write() {
    const std::lock_guard one_writer(write_mutex_);
    std::string text;
    {
      const std::lock_guard lock(mutex_);
      text = page_.text();
      changed_ = false;
    }
    const std::string path = place_.directory + "/" + place_.file, fresh = path + ".new";
    const Fd file(open(fresh.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (!file || ::write(file.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
        rename(fresh.c_str(), path.c_str()) != 0)
      return fail(errno_error("telemetry file " + path, errno));
    return {};
  }

  struct Seen {
    timespec written;
    Nanoseconds since;
  };

  std::mutex mutex_, write_mutex_;
  MetricsPage page_;
  const Place place_;
  std::map<std::string, Seen> seen_;
  std::atomic<bool> changed_{false}, stopping_{false};
  std::unique_ptr<net::Wakeup> wakeup_;
  std::thread thread_;

 public:
  PageServer server{[this] { return all(); }};  // last: its thread uses the others
};

Result<std::int64_t> positive(const Settings& settings, const char* name, std::int64_t usual) {
  NIXL_ASSIGN(const auto value, settings.number(name));
  if (value && *value <= 0)
    return fail(Code::kInvalidArgument, "%s is %lld; a number above 0 is needed", name, static_cast<long long>(*value));
  return value.value_or(usual);
}

}  // namespace

Result<std::unique_ptr<TelemetrySink>> open_prometheus(const Settings& settings, const std::string& agent,
                                                       MetricSet shown) {
  NIXL_ASSIGN(auto page, MetricsPage::open(settings, MetricsPage::label("agent_name", agent), shown));
  auto sink = std::make_unique<Prometheus>(std::move(page));
  NIXL_TRY(serve(sink->server, settings, agent));
  return std::unique_ptr<TelemetrySink>(std::move(sink));
}

Result<std::unique_ptr<TelemetrySink>> open_shared_prometheus(const Settings& settings, const std::string& agent,
                                                              MetricSet shown) {
  static std::atomic<int> number{0};
  const auto directory = settings.text("NIXL_TELEMETRY_MULTIPROC_DIR");
  if (!directory)
    return fail(Code::kMismatch,
                "NIXL_TELEMETRY_EXPORTER=prometheus_mp needs NIXL_TELEMETRY_MULTIPROC_DIR, a directory that all "
                "processes share");
  const std::string rank_variable = settings.text("NIXL_TELEMETRY_RANK_ENV").value_or("LOCAL_RANK");
  const std::string rank = env_text(rank_variable.c_str()).value_or("0");
  SharedPages::Place place;
  place.directory = *directory;
  place.file = std::to_string(getpid()) + "-" + std::to_string(number++) + ".prom";
  NIXL_ASSIGN(place.interval_ms, positive(settings, "NIXL_TELEMETRY_RUN_INTERVAL", place.interval_ms));
  NIXL_ASSIGN(place.stale_s, positive(settings, "NIXL_TELEMETRY_MP_STALE_TTL", place.stale_s));
  const std::string labels = MetricsPage::label("agent_name", agent) + "," + MetricsPage::label("rank", rank);
  NIXL_ASSIGN(auto page, MetricsPage::open(settings, labels, shown));
  auto sink = std::make_unique<SharedPages>(std::move(page), std::move(place));
  NIXL_TRY(sink->start());
  if (rank == "0") NIXL_TRY(serve(sink->server, settings, agent));
  return std::unique_ptr<TelemetrySink>(std::move(sink));
}

}  // namespace nixl::core
