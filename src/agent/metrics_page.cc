#include "agent/metrics_page.h"

#include <algorithm>
#include <map>

#include "agent/settings.h"
#include "base/env.h"

namespace nixl::core {
namespace {

Result<std::vector<std::int64_t>> bucket_bounds(const Settings& settings) {
  std::vector<std::int64_t> bounds{10, 50, 100, 500, 1'000, 5'000, 10'000, 50'000, 100'000, 1'000'000};
  const auto text = settings.text("NIXL_TELEMETRY_HISTOGRAM_BUCKETS_US");
  if (!text) return bounds;
  bounds.clear();
  std::string rest = *text + ",";
  for (std::size_t comma; (comma = rest.find(',')) != std::string::npos; rest.erase(0, comma + 1)) {
    const auto bound = parse_int(rest.substr(0, comma));
    if (!bound || *bound <= 0 || (!bounds.empty() && *bound <= bounds.back()))
      return fail(Code::kInvalidArgument,
                  "NIXL_TELEMETRY_HISTOGRAM_BUCKETS_US is '%s'; rising numbers with commas are needed", text->c_str());
    bounds.push_back(*bound);
  }
  return bounds;
}

}  // namespace

Result<MetricsPage> MetricsPage::open(const Settings& settings, std::string labels, MetricSet shown) {
  NIXL_ASSIGN(auto bounds, bucket_bounds(settings));
  return MetricsPage(std::move(labels), shown, std::move(bounds));
}

MetricsPage::MetricsPage(std::string labels, MetricSet shown, std::vector<std::int64_t> bounds)
    : labels_(std::move(labels)), shown_(shown), bounds_(std::move(bounds)) {
  for (Histogram* histogram : {&transfer_, &post_}) histogram->counts.resize(bounds_.size() + 1);
}

std::string MetricsPage::label(const char* name, std::string_view value) {
  std::string out = std::string(name) + "=\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out + "\"";
}

void MetricsPage::add(const TelemetrySink::Event& event) {
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

std::string MetricsPage::text() const {
  std::string out;
  for (const auto& [metric, name] : {std::pair(Metric::kTxBytes, "agent_tx"), {Metric::kRxBytes, "agent_rx"}}) {
    counter(out, metric, std::string(name) + "_bytes_total", total(metric));
    gauge(out, metric, std::string(name) + "_last_bytes", last(metric));
  }
  counter(out, Metric::kTxRequests, "agent_tx_requests_num_total", total(Metric::kTxRequests));
  counter(out, Metric::kRxRequests, "agent_rx_requests_num_total", total(Metric::kRxRequests));
  for (const Metric metric : {Metric::kMemoryRegistered, Metric::kMemoryDeregistered}) {
    const std::string name = metric_name(metric);
    counter(out, metric, name + "_total", total(metric));
    gauge(out, metric, name + "_last_bytes", last(metric));
  }
  times(out, Metric::kTransferTime, "agent_xfer_time", transfer_);
  times(out, Metric::kPostTime, "agent_xfer_post_time", post_);
  bool first = true;
  for (int status = -1; status >= -kNumErrors; --status) {
    const Metric metric = metric_of_error(status);
    if (!shown_.test(static_cast<std::size_t>(metric))) continue;
    if (std::exchange(first, false)) out += "# TYPE agent_errors_total counter\n";
    line(out, "agent_errors_total", total(metric), std::string(",status=\"") + status_name(status) + "\"");
  }
  counter(out, Metric::kEventsDropped, "agent_telemetry_events_dropped_total", total(Metric::kEventsDropped));
  return out;
}

void MetricsPage::line(std::string& out, const std::string& name, std::uint64_t value,
                       const std::string& labels) const {
  out += name + "{" + labels_ + labels + "} " + std::to_string(value) + "\n";
}
void MetricsPage::counter(std::string& out, Metric metric, const std::string& name, std::uint64_t value) const {
  if (!shown_.test(static_cast<std::size_t>(metric))) return;
  out += "# TYPE " + name + " counter\n";
  line(out, name, value);
}
void MetricsPage::gauge(std::string& out, Metric metric, const std::string& name, std::uint64_t value) const {
  if (!shown_.test(static_cast<std::size_t>(metric))) return;
  out += "# TYPE " + name + " gauge\n";
  line(out, name, value);
}
void MetricsPage::times(std::string& out, Metric metric, const std::string& name, const Histogram& histogram) const {
  if (!shown_.test(static_cast<std::size_t>(metric))) return;
  counter(out, metric, name + "_total", histogram.sum);
  gauge(out, metric, name, histogram.last);
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

std::string merge_pages(std::span<const std::string> pages) {
  std::vector<std::string> order;               // the `# TYPE` lines as they first came
  std::map<std::string, std::string> lines_of;  // by `# TYPE` line
  for (const std::string& page : pages) {
    std::string type;
    for (std::size_t at = 0, end; at < page.size(); at = end + 1) {
      end = std::min(page.find('\n', at), page.size());
      const std::string text = page.substr(at, end - at);
      if (text.starts_with("# TYPE ")) {
        type = text;
        if (lines_of.emplace(type, "").second) order.push_back(type);
      } else if (!type.empty() && text.find("} ") != std::string::npos && end < page.size()) {
        lines_of[type] += text + "\n";
      }
    }
  }
  std::string out;
  for (const std::string& type : order) out += type + "\n" + lines_of[type];
  return out;
}

}  // namespace nixl::core
