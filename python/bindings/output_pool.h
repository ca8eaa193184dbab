// Recycled host memory for the outputs of the CPU path. A dispatch returns blocks of hundreds of megabytes of which it fills
// a part; fresh pages for that part at every call would cost more than the copy itself.
//
// Threads: any. A block belongs to whoever took it until it is given back; free blocks are kept up to a bound in bytes.
#pragma once
#include <cstddef>
#include <map>
#include <mutex>
#include <vector>

class OutputPool {
 public:
  static OutputPool& instance();

  void* take(std::size_t bytes);  // page aligned; content undefined; throws std::bad_alloc
  void give(void* block, std::size_t bytes) noexcept;

 private:
  std::mutex mutex_;
  std::map<std::size_t, std::vector<void*>> free_;
  std::size_t free_bytes_ = 0;
};
