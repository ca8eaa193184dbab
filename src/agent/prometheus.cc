#include "agent/prometheus.h"

#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "agent/settings.h"
#include "base/env.h"
#include "base/log.h"
#include "net/local.h"
#include "net/tcp.h"
#include "net/wait.h"

namespace nixl::core {
namespace {

constexpr const char* kStatusNames[] = {"NOT_POSTED", "INVALID_PARAM", "BACKEND", "NOT_FOUND", "MISMATCH", "NOT_ALLOWED",
                                        "REPOST_ACTIVE", "UNKNOWN", "NOT_SUPPORTED", "REMOTE_DISCONNECT", "CANCELED",
                                        "NO_TELEMETRY"};

struct Histogram {
  std::vector<std::uint64_t> counts;  // one more than bounds
  std::uint64_t sum = 0, last = 0;
};

class Page {
 public:
  Page(std::string agent, std::vector<std::int64_t> bounds) : agent_(std::move(agent)), bounds_(std::move(bounds)) {
    for (Histogram* histogram : {&transfer_, &post_}) histogram->counts.resize(bounds_.size() + 1);
  }

  void add(const TelemetrySink::Event& event) {
    const auto number = static_cast<std::uint32_t>(event.metric);
    if (event.metric == Metric::kTransferTime || event.metric == Metric::kPostTime) {
      Histogram& histogram = event.metric == Metric::kTransferTime ? transfer_ : post_;
      const auto place = std::lower_bound(bounds_.begin(), bounds_.end(), static_cast<std::int64_t>(event.value));
      ++histogram.counts[static_cast<std::size_t>(place - bounds_.begin())];
      histogram.sum += event.value;
      histogram.last = event.value;
    } else if (number < totals_.size()) {
      totals_[number] += event.value;
      last_[number] = event.value;
    }
  }

  std::string text() const {
    std::string out;
    counter(out, "agent_tx_bytes_total", total(Metric::kTxBytes));
    counter(out, "agent_rx_bytes_total", total(Metric::kRxBytes));
    gauge(out, "agent_tx_last_bytes", last(Metric::kTxBytes));
    gauge(out, "agent_rx_last_bytes", last(Metric::kRxBytes));
    counter(out, "agent_tx_requests_num_total", total(Metric::kTxRequests));
    counter(out, "agent_rx_requests_num_total", total(Metric::kRxRequests));
    counter(out, "agent_memory_registered_total", total(Metric::kMemoryRegistered));
    gauge(out, "agent_memory_registered_last_bytes", last(Metric::kMemoryRegistered));
    counter(out, "agent_memory_deregistered_total", total(Metric::kMemoryDeregistered));
    gauge(out, "agent_memory_deregistered_last_bytes", last(Metric::kMemoryDeregistered));
    times(out, "agent_xfer_time", transfer_);
    times(out, "agent_xfer_post_time", post_);
    out += "# TYPE agent_errors_total counter\n";
    for (std::size_t i = 0; i < std::size(kStatusNames); ++i)
      line(out, "agent_errors_total", totals_[static_cast<std::size_t>(Metric::kFirstError) + i],
           std::string(",status=\"") + kStatusNames[i] + "\"");
    counter(out, "agent_telemetry_events_dropped_total", total(Metric::kEventsDropped));
    return out;
  }

 private:
  std::uint64_t total(Metric metric) const { return totals_[static_cast<std::size_t>(metric)]; }
  std::uint64_t last(Metric metric) const { return last_[static_cast<std::size_t>(metric)]; }
  void line(std::string& out, const std::string& name, std::uint64_t value, const std::string& labels = "") const {
    out += name + "{agent_name=\"";
    for (const char c : agent_) {
      if (c == '"' || c == '\\') out += '\\';
      out += c == '\n' ? ' ' : c;
    }
    out += "\"" + labels + "} " + std::to_string(value) + "\n";
  }
  void counter(std::string& out, const std::string& name, std::uint64_t value) const {
    out += "# TYPE " + name + " counter\n";
    line(out, name, value);
  }
  void gauge(std::string& out, const std::string& name, std::uint64_t value) const {
    out += "# TYPE " + name + " gauge\n";
    line(out, name, value);
  }
  void times(std::string& out, const std::string& name, const Histogram& histogram) const {
    counter(out, name + "_total", histogram.sum);
    gauge(out, name, histogram.last);
    out += "# TYPE " + name + "_us histogram\n";
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < histogram.counts.size(); ++i) {
      sum += histogram.counts[i];
      const std::string bound = i < bounds_.size() ? std::to_string(bounds_[i]) : "+Inf";
      line(out, name + "_us_bucket", sum, ",le=\"" + bound + "\"");
    }
    line(out, name + "_us_sum", histogram.sum);
    line(out, name + "_us_count", sum);
  }

  const std::string agent_;
  const std::vector<std::int64_t> bounds_;
  std::array<std::uint64_t, 21> totals_{}, last_{};
  Histogram transfer_, post_;
};

class Prometheus final : public TelemetrySink {
 public:
  explicit Prometheus(Page page) : page_(std::move(page)) {}
  ~Prometheus() override {
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
  void add(const Event* events, std::size_t count) override {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < count; ++i) page_.add(events[i]);
  }

 private:
  void loop() {
    while (!stopping_) {
      pollfd waits[] = {{wakeup_->fd(), POLLIN, 0}, {socket_.get(), POLLIN, 0}};
      if (!net::wait_any(waits, Deadline::never())) return;
      if (!waits[1].revents) continue;
      if (auto guest = net::accept_connection(socket_.get())) answer(guest->get());
    }
  }
  // One request a connection; its text does not matter beyond its end.
  void answer(int guest) {
    const Deadline deadline = Deadline::after(1'000'000'000);
    std::string request;
    while (request.find("\r\n\r\n") == std::string::npos && request.size() < 16384) {
      char buffer[2048];
      if (!net::wait_for(guest, POLLIN, deadline, "an HTTP request")) return;
      const ssize_t got = recv(guest, buffer, sizeof buffer, MSG_DONTWAIT);
      if (got <= 0) return;
      request.append(buffer, static_cast<std::size_t>(got));
    }
    std::string body;
    {
      const std::lock_guard lock(mutex_);
      body = page_.text();
    }
    const std::string reply = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nConnection: close\r\nContent-Length: " +
                              std::to_string(body.size()) + "\r\n\r\n" + body;
    std::size_t written = 0;
    while (written < reply.size()) {
      if (!net::wait_for(guest, POLLOUT, deadline, "room for the answer")) return;
      const ssize_t sent = send(guest, reply.data() + written, reply.size() - written, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent <= 0) return;
      written += static_cast<std::size_t>(sent);
    }
  }

  std::mutex mutex_;
  Page page_;
  Fd socket_;
  std::unique_ptr<net::Wakeup> wakeup_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

Result<std::vector<std::int64_t>> bucket_bounds(const Settings& settings) {
  std::vector<std::int64_t> bounds{10, 50, 100, 500, 1'000, 5'000, 10'000, 50'000, 100'000, 1'000'000};
  const auto text = settings.text("NIXL_TELEMETRY_HISTOGRAM_BUCKETS_US");
  if (!text) return bounds;
  bounds.clear();
  std::string rest = *text + ",";
  for (std::size_t comma; (comma = rest.find(',')) != std::string::npos; rest.erase(0, comma + 1)) {
    const auto bound = parse_int(rest.substr(0, comma));
    if (!bound || *bound <= 0 || (!bounds.empty() && *bound <= bounds.back()))
      return fail(Code::kInvalidArgument, "NIXL_TELEMETRY_HISTOGRAM_BUCKETS_US is '%s'; rising numbers with commas are needed",
                  text->c_str());
    bounds.push_back(*bound);
  }
  return bounds;
}

}  // namespace

Result<std::unique_ptr<TelemetrySink>> open_prometheus(const Settings& settings, const std::string& agent) {
  NIXL_ASSIGN(const auto port, settings.number("NIXL_TELEMETRY_PROMETHEUS_PORT"));
  NIXL_ASSIGN(const auto local, settings.flag("NIXL_TELEMETRY_PROMETHEUS_LOCAL"));
  NIXL_ASSIGN(auto bounds, bucket_bounds(settings));
  if (port && (*port < 0 || *port > 65535))
    return fail(Code::kInvalidArgument, "NIXL_TELEMETRY_PROMETHEUS_PORT is %lld; 0 to 65535 are allowed", static_cast<long long>(*port));
  auto sink = std::make_unique<Prometheus>(Page(agent, std::move(bounds)));
  const net::Endpoint at{local.value_or(false) ? "127.0.0.1" : "", static_cast<std::uint16_t>(port.value_or(9090))};
  if (auto served = sink->serve(at); !served)
    NIXL_WARN("agent %s: telemetry cannot be read on port %u: %s", agent.c_str(), at.port, served.error().reason.c_str());
  return std::unique_ptr<TelemetrySink>(std::move(sink));
}

}  // namespace nixl::core
