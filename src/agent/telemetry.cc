#include "agent/telemetry.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <mutex>
#include <vector>

#include "agent/prometheus.h"
#include "agent/request.h"
#include "agent/settings.h"
#include "base/fd.h"
#include "base/log.h"

namespace nixl::core {
namespace {

// The ring file: this header, then `capacity` events. One writer; a reader moves read_pos. Others can write to the file and cut it
// short, so nothing that is read from it decides where is written, and its length is looked at before.
struct RingHeader {
  std::atomic<std::uint64_t> write_pos, read_pos;
  std::int32_t version, expected_version;
  std::uint64_t capacity, mask;
};
struct RingEvent {
  std::uint32_t type, pad;
  std::uint64_t value;
};
static_assert(sizeof(RingHeader) == 40 && sizeof(RingEvent) == 16);
constexpr std::int32_t kRingVersion = 4;

class RingFile final : public TelemetrySink {
 public:
  static Result<std::unique_ptr<TelemetrySink>> open(const std::string& directory, const std::string& agent,
                                                     std::uint64_t capacity) {
    if (agent.find('/') != std::string::npos)
      return fail(Code::kInvalidArgument, "agent name '%s' cannot name a telemetry file", agent.c_str());
    mkdir(directory.c_str(), 0755);
    const std::string path = directory + "/" + agent;
    Fd file(::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (!file) return fail(errno_error("telemetry file " + path, errno));
    const std::size_t size = sizeof(RingHeader) + capacity * sizeof(RingEvent);
    // With its blocks: on a full disk a hole in a mapping would be a fatal signal later.
    if (const int error = posix_fallocate(file.get(), 0, static_cast<off_t>(size)))
      return fail(errno_error("telemetry file " + path + " of " + std::to_string(size) + " bytes", error));
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    if (memory == MAP_FAILED) return fail(errno_error("mapping telemetry file " + path, errno));
    auto ring = std::make_unique<RingFile>();
    ring->path_ = path;
    ring->file_ = std::move(file);
    ring->size_ = size;
    ring->capacity_ = capacity;
    ring->header_ = static_cast<RingHeader*>(memory);
    ring->events_ = reinterpret_cast<RingEvent*>(ring->header_ + 1);
    ring->header_->capacity = capacity;
    ring->header_->mask = capacity - 1;
    ring->header_->expected_version = kRingVersion;
    std::atomic_thread_fence(std::memory_order_release);
    ring->header_->version = kRingVersion;
    return ring;
  }
  ~RingFile() override { munmap(header_, size_); }

  void add(const Event* events, std::size_t count) override {
    const std::lock_guard lock(mutex_);
    if (!is_whole()) return;
    const std::uint64_t at = header_->write_pos.load(std::memory_order_relaxed);
    const std::uint64_t free = capacity_ - (at - header_->read_pos.load(std::memory_order_acquire));
    const std::size_t extra = dropped_ ? 1 : 0;
    if (free < count + extra) {
      dropped_ += count;
      return;
    }
    std::uint64_t to = at;
    if (extra) put(to++, Metric::kEventsDropped, std::exchange(dropped_, 0));
    for (std::size_t i = 0; i < count; ++i) put(to++, events[i].metric, events[i].value);
    header_->write_pos.store(to, std::memory_order_release);
  }

 private:
  void put(std::uint64_t at, Metric metric, std::uint64_t value) {
    events_[at & (capacity_ - 1)] = {static_cast<std::uint32_t>(metric), 0, value};
  }
  bool is_whole() {
    struct stat about {};
    if (fstat(file_.get(), &about) == 0 && about.st_size >= static_cast<off_t>(size_)) return true;
    if (!std::exchange(warned_, true))
      NIXL_WARN("telemetry file %s was cut to %lld bytes, %zu are needed: no more events are written", path_.c_str(),
                static_cast<long long>(about.st_size), size_);
    return false;
  }
  std::mutex mutex_;
  std::string path_;
  Fd file_;
  bool warned_ = false;
  std::size_t size_ = 0;
  std::uint64_t capacity_ = 0;
  std::uint64_t dropped_ = 0;
  RingHeader* header_ = nullptr;
  RingEvent* events_ = nullptr;
};

constexpr const char* kStatusNames[kNumErrors] = {
    "NOT_POSTED",    "INVALID_PARAM", "BACKEND",       "NOT_FOUND",         "MISMATCH", "NOT_ALLOWED",
    "REPOST_ACTIVE", "UNKNOWN",       "NOT_SUPPORTED", "REMOTE_DISCONNECT", "CANCELED", "NO_TELEMETRY"};

// NIXL_TELEMETRY_ENABLED_METRICS: globs over the metrics' names, with commas or blanks between them; unset: all.
MetricSet enabled_metrics(const Settings& settings) {
  const auto text = settings.text("NIXL_TELEMETRY_ENABLED_METRICS");
  if (!text) return MetricSet().set();
  MetricSet enabled;
  std::string glob, known;
  for (const char c : *text + ",") {
    if (c != ',' && c != ' ') {
      glob += c;
      continue;
    }
    if (glob.empty()) continue;
    MetricSet fitting;
    for (int i = 0; i < kNumMetrics; ++i) {
      const std::string& name = metric_name(static_cast<Metric>(i));
      fitting[static_cast<std::size_t>(i)] =
          fnmatch(glob.c_str(), name.c_str(), 0) == 0 || fnmatch(glob.c_str(), name.c_str() + 6, 0) == 0;
    }
    if (fitting.none()) {
      if (known.empty())
        for (int i = 0; i < kNumMetrics; ++i) known += " " + metric_name(static_cast<Metric>(i));
      NIXL_WARN("NIXL_TELEMETRY_ENABLED_METRICS: nothing is called '%s'; known:%s", glob.c_str(), known.c_str());
    }
    enabled |= fitting;
    glob.clear();
  }
  return enabled;
}

tl::unexpected<Error> no_doca() {
  constexpr const char* kLibrary = "libdoca_telemetry_exporter.so.2";
  std::string why = std::string(kLibrary) + " is here, but this release does not drive it";
  if (void* library = dlopen(kLibrary, RTLD_LAZY | RTLD_LOCAL))
    dlclose(library);
  else
    why = dlerror();
  return fail(
      Code::kMismatch,
      "NIXL_TELEMETRY_EXPORTER=doca is not available: %s; NIXL_TELEMETRY_EXPORTER=prometheus serves the same figures",
      why.c_str());
}

Result<std::unique_ptr<TelemetrySink>> open_sink(const Settings& settings, const std::string& agent,
                                                 MetricSet enabled) {
  const auto directory = settings.text("NIXL_TELEMETRY_DIR");
  const std::string exporter = settings.text("NIXL_TELEMETRY_EXPORTER").value_or(directory ? "BUFFER" : "NOP");
  NIXL_ASSIGN(const auto size, settings.number("NIXL_TELEMETRY_BUFFER_SIZE"));
  if (size && *size <= 0)
    return fail(Code::kInvalidArgument, "NIXL_TELEMETRY_BUFFER_SIZE is %lld; a size above 0 is needed",
                static_cast<long long>(*size));
  if (exporter == "NOP") return std::unique_ptr<TelemetrySink>();
  if (exporter == "BUFFER") {
    if (!directory) return fail(Code::kMismatch, "NIXL_TELEMETRY_EXPORTER=BUFFER needs NIXL_TELEMETRY_DIR");
    return RingFile::open(*directory, agent, std::bit_ceil(static_cast<std::uint64_t>(size.value_or(4096))));
  }
  if (exporter == "prometheus") return open_prometheus(settings, agent, enabled);
  if (exporter == "prometheus_mp") return open_shared_prometheus(settings, agent, enabled);
  if (exporter == "doca") return no_doca();
  return fail(Code::kMismatch, "NIXL_TELEMETRY_EXPORTER is '%s'; known: BUFFER NOP prometheus prometheus_mp doca",
              exporter.c_str());
}

}  // namespace

Result<std::unique_ptr<Telemetry>> Telemetry::open(const Settings& settings, const std::string& agent, bool wanted) {
  NIXL_ASSIGN(const auto set, settings.flag("NIXL_TELEMETRY_ENABLE"));
  if (!set.value_or(wanted)) return std::unique_ptr<Telemetry>();
  const MetricSet enabled = enabled_metrics(settings);
  NIXL_ASSIGN(auto sink, open_sink(settings, agent, enabled));
  return std::make_unique<Telemetry>(std::move(sink), enabled);
}

const std::string& metric_name(Metric metric) {
  static const std::vector<std::string> kNames = [] {
    std::vector<std::string> names;
    for (const char* name : {"tx_bytes", "rx_bytes", "tx_requests_num", "rx_requests_num", "memory_registered",
                             "memory_deregistered", "xfer_time", "xfer_post_time"})
      names.push_back(std::string("agent_") + name);
    for (const std::string_view status : kStatusNames) {
      names.emplace_back("agent_errors_");
      for (const char c : status) names.back() += c == '_' ? '_' : static_cast<char>(c - 'A' + 'a');
    }
    names.emplace_back("agent_telemetry_events_dropped");
    return names;
  }();
  return kNames[static_cast<std::size_t>(metric)];
}

const char* status_name(int status) {
  return kStatusNames[-status - 1];
}

void Telemetry::add(const TelemetrySink::Event* events, std::size_t count) {
  if (!sink_) return;
  if (enabled_.all()) return sink_->add(events, count);
  TelemetrySink::Event kept[4];
  std::size_t num_kept = 0;
  for (std::size_t i = 0; i < count; ++i)
    if (enabled_.test(static_cast<std::size_t>(events[i].metric))) kept[num_kept++] = events[i];
  if (num_kept) sink_->add(kept, num_kept);
}

void Telemetry::transfer_done(Op op, const TransferTimes& times) {
  const bool tx = op == Op::kWrite;
  const TelemetrySink::Event events[] = {
      {Metric::kPostTime, static_cast<std::uint64_t>(times.post_us)},
      {Metric::kTransferTime, static_cast<std::uint64_t>(times.transfer_us)},
      {tx ? Metric::kTxBytes : Metric::kRxBytes, times.total_bytes},
      {tx ? Metric::kTxRequests : Metric::kRxRequests, 1},
  };
  add(events, std::size(events));
}

void Telemetry::failed(Code code) {
  const TelemetrySink::Event event{metric_of_error(status_of(code)), 1};
  add(&event, 1);
}

void Telemetry::memory(Metric metric, std::uint64_t bytes) {
  const TelemetrySink::Event event{metric, bytes};
  add(&event, 1);
}

int status_of(Code code) noexcept {
  switch (code) {
    case Code::kNotPosted:
      return -1;
    case Code::kInvalidArgument:
      return -2;
    case Code::kAgain:
    case Code::kTimeout:
    case Code::kIo:
      return -3;
    case Code::kNotFound:
      return -4;
    case Code::kMismatch:
      return -5;
    case Code::kNotAllowed:
      return -6;
    case Code::kBusy:
      return -7;
    case Code::kInternal:
      return -8;
    case Code::kUnsupported:
      return -9;
    case Code::kPeerLost:
      return -10;
    case Code::kCancelled:
      return -11;
  }
  return -8;
}

}  // namespace nixl::core
