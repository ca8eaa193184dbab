#include "backends/hf3fs/usrbio.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

#include "base/clock.h"
#include "base/env.h"

namespace nixl::core::hf3fs {
namespace {

constexpr const char* kLibrary = "libhf3fs_api_shared.so";

template <typename F>
bool find(void* library, const char* name, F& into) {
  into = reinterpret_cast<F>(::dlsym(library, name));
  return into != nullptr;
}

Result<Usrbio> open_library() {
  const std::string name = env_text("NIXL_HF3FS_LIBRARY").value_or(kLibrary);
  void* const library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* error = ::dlerror();
    return fail(Code::kUnsupported,
                "the 3FS client library %s cannot be opened (%s); NIXL_HF3FS_LIBRARY names another file", kLibrary,
                error ? error : name.c_str());
  }
  Usrbio api;
  const bool all =
      find(library, "hf3fs_extract_mount_point", api.extract_mount_point) &&
      find(library, "hf3fs_iovcreate", api.iov_create) && find(library, "hf3fs_iovdestroy", api.iov_destroy) &&
      find(library, "hf3fs_iorcreate", api.ior_create) && find(library, "hf3fs_iordestroy", api.ior_destroy) &&
      find(library, "hf3fs_reg_fd", api.reg_fd) && find(library, "hf3fs_dereg_fd", api.dereg_fd) &&
      find(library, "hf3fs_prep_io", api.prep_io) && find(library, "hf3fs_submit_ios", api.submit_ios) &&
      find(library, "hf3fs_wait_for_ios", api.wait_for_ios);
  if (!all) {
    const char* error = ::dlerror();
    return fail(Code::kUnsupported, "%s is no 3FS client library: %s", name.c_str(),
                error ? error : "a function is missing");
  }
  return api;
}

class UsrbioQueue final : public fileio::Queue {
 public:
  UsrbioQueue(const Usrbio& api, std::uint32_t depth) : api_(api), flights_(depth) {}
  ~UsrbioQueue() override {
    const Deadline deadline = Deadline::after(10'000'000'000);
    std::array<fileio::Done, kMostRunning> gone;
    while (num_running_[0] + num_running_[1] > 0 && !deadline.passed()) {
      reap(gone);
      const std::timespec pause{0, 100'000};
      ::nanosleep(&pause, nullptr);
    }
    for (int write = 0; write < 2; ++write)
      if (ring_open_[write]) api_.ior_destroy(&rings_[write]);
    if (memory_open_) api_.iov_destroy(&memory_);
  }

  Result<void> open(const char* mount_point) {
    if (const int code = api_.iov_create(&memory_, mount_point, flights_.size() * fileio::kMaxCopyBytes, 0, -1))
      return fail(errno_error(std::string("hf3fs_iovcreate at ") + mount_point, -code));
    memory_open_ = true;
    for (int write = 0; write < 2; ++write) {
      const int entries = static_cast<int>(flights_.size());
      if (const int code = api_.ior_create(&rings_[write], mount_point, entries, write == 0, 0, -1))
        return fail(errno_error(std::string("hf3fs_iorcreate at ") + mount_point, -code));
      ring_open_[write] = true;
    }
    return {};
  }

  std::string_view name() const noexcept override { return "usrbio"; }
  std::uint32_t depth() const noexcept override { return static_cast<std::uint32_t>(flights_.size()); }
  std::uint32_t max_iov() const noexcept override { return 1024; }

  Result<std::size_t> submit(std::span<const fileio::Io> batch) override {
    bool told[2] = {false, false};
    for (const fileio::Io& io : batch) {
      const int code = broken_[io.write] ? broken_[io.write] : prepare(io);
      if (code < 0) {
        refused_.push_back({io.slot, code});
        continue;
      }
      flights_[io.slot] = {io, true};
      ++num_running_[io.write];
      told[io.write] = true;
    }
    for (int write = 0; write < 2; ++write)
      if (told[write]) (void)api_.submit_ios(&rings_[write]);  // a hint: the client also looks by itself
    return batch.size();
  }

  std::size_t reap(std::span<fileio::Done> out) override {
    std::size_t count = 0;
    for (; count < out.size() && !refused_.empty(); refused_.pop_back()) out[count++] = refused_.back();
    for (int write = 0; write < 2; ++write) {
      std::array<Cqe, kMostRunning> cqes;
      const std::size_t room = std::min(out.size() - count, cqes.size());
      if (room == 0 || num_running_[write] == 0) continue;
      const std::timespec past{};
      const int got = api_.wait_for_ios(&rings_[write], cqes.data(), static_cast<int>(room), 0, &past);
      if (got < 0 && got != -EAGAIN && got != -ETIMEDOUT && got != -EINTR) give_up(write, got);
      for (int i = 0; i < got; ++i) {
        const auto slot = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(cqes[i].userdata));
        out[count++] = land(slot, cqes[i].result);
      }
    }
    return count;
  }

  // The rings take nothing back; it comes to its own end.
  void cancel(std::uint32_t) noexcept override {}

 private:
  struct Flight {
    fileio::Io io;
    bool running = false;
  };

  std::uint8_t* buffer(std::uint32_t slot) const noexcept { return memory_.base + slot * fileio::kMaxCopyBytes; }

  // What is longer than a buffer comes back short, and the asker goes on with the rest.
  int prepare(const fileio::Io& io) {
    std::size_t bytes = 0;
    for (std::uint32_t i = 0; i < io.num_iov && bytes < fileio::kMaxCopyBytes; ++i) {
      const std::size_t part = std::min(io.iov[i].iov_len, fileio::kMaxCopyBytes - bytes);
      if (io.write) std::memcpy(buffer(io.slot) + bytes, io.iov[i].iov_base, part);
      bytes += part;
    }
    const auto tag = reinterpret_cast<const void*>(static_cast<std::uintptr_t>(io.slot));
    return api_.prep_io(&rings_[io.write], &memory_, !io.write, buffer(io.slot), io.fd, io.offset, bytes, tag);
  }

  fileio::Done land(std::uint32_t slot, std::int64_t result) {
    Flight& flight = flights_[slot];
    flight.running = false;
    --num_running_[flight.io.write];
    if (!flight.io.write) {
      std::size_t done = 0;
      const std::size_t bytes = result > 0 ? static_cast<std::size_t>(result) : 0;
      for (std::uint32_t i = 0; i < flight.io.num_iov && done < bytes; ++i) {
        const std::size_t part = std::min(flight.io.iov[i].iov_len, bytes - done);
        std::memcpy(flight.io.iov[i].iov_base, buffer(slot) + done, part);
        done += part;
      }
    }
    return {slot, result};
  }

  // The ring does not answer any more: what runs on it fails, and nothing new is taken.
  void give_up(int write, int code) {
    broken_[write] = code;
    for (std::uint32_t slot = 0; slot < flights_.size(); ++slot)
      if (flights_[slot].running && flights_[slot].io.write == (write != 0)) refused_.push_back(land(slot, code));
  }

  const Usrbio& api_;
  std::vector<Flight> flights_;
  std::vector<fileio::Done> refused_;
  Iov memory_{};
  Ior rings_[2]{};  // of reads, of writes
  bool memory_open_ = false, ring_open_[2] = {false, false};
  std::uint32_t num_running_[2] = {0, 0};
  int broken_[2] = {0, 0};
};

}  // namespace

Result<const Usrbio*> Usrbio::load() {
  static const Result<Usrbio> kApi = open_library();
  if (!kApi) return fail(kApi.error());
  return &*kApi;
}

Result<std::string> Usrbio::mount_of(const std::string& path) const {
  char mount[sizeof(Iov::mount_point)] = {};
  const int length = extract_mount_point(mount, sizeof mount, path.c_str());
  if (length <= 0 || length > static_cast<int>(sizeof mount))
    return fail(Code::kIo, "%s is not on a mounted 3FS", path.c_str());
  return std::string(mount);
}

Result<std::shared_ptr<RegisteredFile>> RegisteredFile::open(const Usrbio& api, std::shared_ptr<fileio::File> file) {
  std::shared_ptr<RegisteredFile> registered(new RegisteredFile(api, std::move(file)));
  NIXL_TRY(registered->add(registered->file().fd()));
  if (registered->file().direct()) {
    NIXL_ASSIGN(const int twin, registered->file().buffered_fd());
    NIXL_TRY(registered->add(twin));
  }
  return registered;
}

Result<void> RegisteredFile::add(int fd) {
  if (const int code = api_.reg_fd(fd, 0); code > 0) return fail(errno_error("hf3fs_reg_fd of " + file_->name(), code));
  fds_[fds_[0] >= 0] = fd;
  return {};
}

RegisteredFile::~RegisteredFile() {
  for (const int fd : fds_)
    if (fd >= 0) api_.dereg_fd(fd);
}

Result<std::unique_ptr<fileio::Queue>> open_usrbio_queue(const Usrbio& api, const std::string& mount_point,
                                                         std::uint32_t depth) {
  auto queue = std::make_unique<UsrbioQueue>(api, std::min(depth, kMostRunning));
  NIXL_TRY(queue->open(mount_point.c_str()));
  return queue;
}

}  // namespace nixl::core::hf3fs
