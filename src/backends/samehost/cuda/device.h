// What copies need on one device: streams of high priority, counters, and pinned host memory.
#pragma once
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "backends/samehost/cuda/driver.h"
#include "backends/samehost/cuda/list_copy.h"
#include "base/clock.h"

namespace nixl::core::samehost {

// Pinned host memory that every device can use, in power-of-two pieces that are used again.
class PinnedPool : public std::enable_shared_from_this<PinnedPool> {
 public:
  class Piece {
   public:
    Piece() = default;
    Piece(std::shared_ptr<PinnedPool> pool, char* data, std::size_t bytes)
        : pool_(std::move(pool)), data_(data), bytes_(bytes) {}
    Piece(Piece&& other) noexcept { *this = std::move(other); }
    Piece& operator=(Piece&& other) noexcept {
      std::swap(pool_, other.pool_);
      std::swap(data_, other.data_);
      std::swap(bytes_, other.bytes_);
      return *this;
    }
    ~Piece() {
      if (data_) pool_->give_back(data_, bytes_);
    }
    char* data() const noexcept { return data_; }

   private:
    std::shared_ptr<PinnedPool> pool_;
    char* data_ = nullptr;
    std::size_t bytes_ = 0;
  };
  ~PinnedPool();
  Result<Piece> take(std::size_t bytes);

 private:
  void give_back(char* data, std::size_t bytes) noexcept;
  std::mutex mutex_;
  std::map<std::size_t, std::vector<char*>> free_;
};

class Device : public std::enable_shared_from_this<Device> {
 public:
  static Result<std::shared_ptr<Device>> open(int ordinal);
  ~Device();

  int ordinal() const noexcept { return ordinal_; }
  // Copies of one list stay on one stream; several streams let a small list pass a large one.
  cudaStream_t next_stream() noexcept { return streams_[next_.fetch_add(1, std::memory_order_relaxed) % kStreams]; }

  // A device word that holds 0, for ListCopy::blocks_done.
  Result<std::uint32_t*> take_counter();
  void give_back_counter(std::uint32_t* counter) noexcept;

 private:
  static constexpr std::size_t kStreams = 4, kCounters = 8192;
  int ordinal_ = 0;
  cudaStream_t streams_[kStreams] = {};
  std::atomic<std::uint32_t> next_{0};
  std::uint32_t* counters_ = nullptr;
  std::mutex mutex_;
  std::vector<std::uint32_t*> free_;
};

}  // namespace nixl::core::samehost
