#include "agent/telemetry.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <mutex>

#include "agent/prometheus.h"
#include "agent/request.h"
#include "agent/settings.h"
#include "base/fd.h"
#include "base/log.h"

namespace nixl::core {
namespace {

// The ring file: this header, then `capacity` events. One writer; a reader moves read_pos.
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
    const Fd file(::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (!file) return fail(errno_error("telemetry file " + path, errno));
    const std::size_t size = sizeof(RingHeader) + capacity * sizeof(RingEvent);
    if (ftruncate(file.get(), static_cast<off_t>(size)) != 0) return fail(errno_error("telemetry file " + path, errno));
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(), 0);
    if (memory == MAP_FAILED) return fail(errno_error("mapping telemetry file " + path, errno));
    auto ring = std::make_unique<RingFile>();
    ring->size_ = size;
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
    const std::uint64_t at = header_->write_pos.load(std::memory_order_relaxed);
    const std::uint64_t free = header_->capacity - (at - header_->read_pos.load(std::memory_order_acquire));
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
    events_[at & header_->mask] = {static_cast<std::uint32_t>(metric), 0, value};
  }
  std::mutex mutex_;
  std::size_t size_ = 0;
  std::uint64_t dropped_ = 0;
  RingHeader* header_ = nullptr;
  RingEvent* events_ = nullptr;
};

Result<std::unique_ptr<TelemetrySink>> open_sink(const Settings& settings, const std::string& agent) {
  const auto directory = settings.text("NIXL_TELEMETRY_DIR");
  const std::string exporter = settings.text("NIXL_TELEMETRY_EXPORTER").value_or(directory ? "BUFFER" : "NOP");
  NIXL_ASSIGN(const auto size, settings.number("NIXL_TELEMETRY_BUFFER_SIZE"));
  if (size && *size <= 0)
    return fail(Code::kInvalidArgument, "NIXL_TELEMETRY_BUFFER_SIZE is %lld; a size above 0 is needed", static_cast<long long>(*size));
  if (exporter == "NOP") return std::unique_ptr<TelemetrySink>();
  if (exporter == "BUFFER") {
    if (!directory) return fail(Code::kMismatch, "NIXL_TELEMETRY_EXPORTER=BUFFER needs NIXL_TELEMETRY_DIR");
    return RingFile::open(*directory, agent, std::bit_ceil(static_cast<std::uint64_t>(size.value_or(4096))));
  }
  if (exporter == "prometheus") return open_prometheus(settings, agent);
  return fail(Code::kMismatch, "NIXL_TELEMETRY_EXPORTER is '%s'; this build has BUFFER, NOP and prometheus", exporter.c_str());
}

}  // namespace

Result<std::unique_ptr<Telemetry>> Telemetry::open(const Settings& settings, const std::string& agent, bool wanted) {
  NIXL_ASSIGN(const auto set, settings.flag("NIXL_TELEMETRY_ENABLE"));
  if (!set.value_or(wanted)) return std::unique_ptr<Telemetry>();
  NIXL_ASSIGN(auto sink, open_sink(settings, agent));
  return std::make_unique<Telemetry>(std::move(sink));
}

void Telemetry::transfer_done(Op op, const TransferTimes& times) {
  if (!sink_) return;
  const bool tx = op == Op::kWrite;
  const TelemetrySink::Event events[] = {
      {Metric::kPostTime, static_cast<std::uint64_t>(times.post_us)},
      {Metric::kTransferTime, static_cast<std::uint64_t>(times.transfer_us)},
      {tx ? Metric::kTxBytes : Metric::kRxBytes, times.total_bytes},
      {tx ? Metric::kTxRequests : Metric::kRxRequests, 1},
  };
  sink_->add(events, std::size(events));
}

void Telemetry::failed(Code code) {
  if (!sink_) return;
  const int number = static_cast<int>(Metric::kFirstError) - 1 - status_of(code);
  const TelemetrySink::Event event{static_cast<Metric>(number), 1};
  sink_->add(&event, 1);
}

void Telemetry::memory(Metric metric, std::uint64_t bytes) {
  if (!sink_) return;
  const TelemetrySink::Event event{metric, bytes};
  sink_->add(&event, 1);
}

int status_of(Code code) noexcept {
  switch (code) {
    case Code::kNotPosted: return -1;
    case Code::kInvalidArgument: return -2;
    case Code::kAgain:
    case Code::kTimeout:
    case Code::kIo: return -3;
    case Code::kNotFound: return -4;
    case Code::kMismatch: return -5;
    case Code::kNotAllowed: return -6;
    case Code::kBusy: return -7;
    case Code::kInternal: return -8;
    case Code::kUnsupported: return -9;
    case Code::kPeerLost: return -10;
    case Code::kCancelled: return -11;
  }
  return -8;
}

}  // namespace nixl::core
