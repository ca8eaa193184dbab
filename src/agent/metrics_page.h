// The figures of one agent as a page in Prometheus's text format, and several such pages as one.
#pragma once
#include <array>
#include <span>
#include <string>
#include <vector>

#include "agent/telemetry.h"

namespace nixl::core {

// Not thread-safe.
class MetricsPage {
 public:
  // `labels`: of every line, e.g. `agent_name="a"`. NIXL_TELEMETRY_HISTOGRAM_BUCKETS_US gives the histograms' bounds.
  static Result<MetricsPage> open(const Settings& settings, std::string labels, MetricSet shown);
  static std::string label(const char* name, std::string_view value);

  void add(const TelemetrySink::Event& event);
  std::string text() const;

 private:
  struct Histogram {
    std::vector<std::uint64_t> counts;  // one more than bounds
    std::uint64_t sum = 0, last = 0;
  };
  MetricsPage(std::string labels, MetricSet shown, std::vector<std::int64_t> bounds);
  std::uint64_t total(Metric metric) const { return totals_[static_cast<std::size_t>(metric)]; }
  std::uint64_t last(Metric metric) const { return last_[static_cast<std::size_t>(metric)]; }
  void line(std::string& out, const std::string& name, std::uint64_t value, const std::string& labels = "") const;
  void counter(std::string& out, Metric metric, const std::string& name, std::uint64_t value) const;
  void gauge(std::string& out, Metric metric, const std::string& name, std::uint64_t value) const;
  void times(std::string& out, Metric metric, const std::string& name, const Histogram& histogram) const;

  const std::string labels_;
  const MetricSet shown_;
  const std::vector<std::int64_t> bounds_;
  std::array<std::uint64_t, kNumMetrics> totals_{}, last_{};
  Histogram transfer_, post_;
};

// One page in which each metric's lines stand together, as the format wants it. Lines that are no part of a page are left out.
std::string merge_pages(std::span<const std::string> pages);

}  // namespace nixl::core
