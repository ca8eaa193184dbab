#include "device/staging/gpu_copier.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "device/staging/gpu_driver.h"

namespace nixl::core {
namespace {

constexpr unsigned kPortable = 1;     // CU_MEMHOSTALLOC_PORTABLE: pinned for every GPU
constexpr unsigned kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING: not held up by the program's default stream

std::uint64_t number(const void* address) {
  return reinterpret_cast<std::uint64_t>(address);
}

class GpuCopier final : public Copier {
 public:
  GpuCopier(const GpuDriver& driver, int gpu) : driver_(driver), gpu_(gpu) {}

  Result<void> to_host(void* host, std::span<const iovec> memory) override {
    return run(memory, SIZE_MAX, [&](const iovec& part, std::size_t at, std::size_t bytes, void* stream) {
      return driver_.copy_async(number(host) + at, number(part.iov_base), bytes, stream);
    });
  }
  Result<void> from_host(std::span<const iovec> memory, const void* host, std::size_t bytes) override {
    return run(memory, bytes, [&](const iovec& part, std::size_t at, std::size_t count, void* stream) {
      return driver_.copy_async(number(part.iov_base), number(host) + at, count, stream);
    });
  }
  std::string last_error() const override {
    const std::lock_guard lock(mutex_);
    return error_;
  }
  void* allocate(std::size_t bytes) override {
    void* buffer = nullptr;
    return driver_.use(gpu_) && driver_.allocate_pinned(&buffer, bytes, kPortable) == 0 ? buffer : nullptr;
  }
  // Also called where a backend is closed, on a thread of the program, whose context stays as it is.
  void free(void* buffer, std::size_t) override {
    int device = 0;
    void *own = nullptr, *before = nullptr;
    if (driver_.get_context(&before) != 0 || driver_.device(&device, gpu_) != 0 ||
        driver_.retain_context(&own, device) != 0 || driver_.set_context(own) != 0)
      return;
    driver_.free_pinned(buffer);
    driver_.set_context(before);
  }

 private:
  template <typename Copy>
  Result<void> run(std::span<const iovec> memory, std::size_t most, Copy copy) {
    auto done = [&]() -> Result<void> {
      NIXL_TRY(driver_.use(gpu_));
      NIXL_ASSIGN(void* const stream, take_stream());
      Result<void> queued;
      std::size_t at = 0;
      for (const iovec& part : memory) {
        const std::size_t bytes = std::min(part.iov_len, most - at);
        if (bytes == 0) continue;
        if (queued = driver_.check(copy(part, at, bytes, stream), "cuMemcpyAsync"); !queued) break;
        at += bytes;
      }
      const auto ended = driver_.check(driver_.synchronize_stream(stream), "cuStreamSynchronize");
      give_back(stream);
      return queued ? ended : queued;
    }();
    if (!done) {
      const std::lock_guard lock(mutex_);
      error_ = "GPU " + std::to_string(gpu_) + ": " + done.error().reason;
    }
    return done;
  }
  Result<void*> take_stream() {
    {
      const std::lock_guard lock(mutex_);
      if (!idle_.empty()) {
        void* const stream = idle_.back();
        idle_.pop_back();
        return stream;
      }
    }
    void* stream = nullptr;
    NIXL_TRY(driver_.check(driver_.create_stream(&stream, kNonBlocking), "cuStreamCreate"));
    return stream;
  }
  void give_back(void* stream) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(stream);
  }

  const GpuDriver& driver_;
  const int gpu_;
  mutable std::mutex mutex_;
  std::vector<void*> idle_;  // streams
  std::string error_;
};

}  // namespace

Result<Copier*> gpu_copier(std::uint64_t gpu) {
  NIXL_ASSIGN(const GpuDriver* driver, GpuDriver::load());
  NIXL_ASSIGN(const int count, driver->start());
  if (gpu >= static_cast<std::uint64_t>(count))
    return fail(Code::kInvalidArgument, "GPU %llu: this process sees %d, numbered from 0",
                static_cast<unsigned long long>(gpu), count);
  static std::mutex mutex;
  static auto& copiers = *new std::map<std::uint64_t, GpuCopier>;  // never destroyed: threads may outlive statics
  const std::lock_guard lock(mutex);
  return &copiers.try_emplace(gpu, *driver, static_cast<int>(gpu)).first->second;
}

}  // namespace nixl::core
