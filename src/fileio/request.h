// Request: a list of pieces cut into jobs that a queue can take as they are. Internal to fileio.
#pragma once
#include <atomic>
#include <vector>

#include "fileio/engine.h"

namespace nixl::core::fileio {

inline constexpr std::uint64_t kMaxJobBytes = 1 << 20;
// Requests up to this size are done at once, in start(), when the page cache can serve them.
inline constexpr std::uint64_t kInlineBytes = 256 << 10;

struct Job {
  std::uint64_t offset = 0;
  std::uint32_t first_iov = 0, num_iov = 0;
  std::uint32_t bytes = 0;
  std::uint32_t file = 0;  // index into files
  int fd = -1;
  Copier* copier = nullptr;
};

class Request {
 public:
  struct LaneJobs {
    std::vector<Job> jobs;
    std::size_t next = 0;  // first job not yet given to the queue
    bool queued = false;   // stands in the lane's runnable list
  };

  bool write = false;
  bool staged = false;      // some memory goes through a Copier of the caller
  bool may_inline = false;  // small, page cache only
  std::vector<iovec> iovs;
  std::vector<const File*> files;
  LaneJobs lanes[2];
  std::string queue_names;

  std::size_t left = 0;  // jobs without a result, guarded by the engine's lock
  std::size_t in_flight = 0;
  bool stopping = false;  // failed or cancelled: no further job is started
  Error error;
  std::atomic<Engine::State> state{Engine::State::kIdle};

  std::size_t num_jobs() const noexcept { return lanes[0].jobs.size() + lanes[1].jobs.size(); }
};

struct CutRules {
  bool write = false;
  int buffered_lane = 1;          // where files in the page cache go
  std::uint32_t max_iov[2] = {};  // by lane
  Copier* aligner = nullptr;      // copies memory that is misaligned for direct I/O
};

// Fills lanes, iovs and files of `request`.
Result<void> cut(std::span<const Piece> pieces, const CutRules& rules, Request& request);

}  // namespace nixl::core::fileio
