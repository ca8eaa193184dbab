// Path: the verbs of expert parallelism on one kind of device. The CPU path and the CUDA path implement it; Buffer puts one
// path and one Group together and knows nothing else about either.
//
// Threads. The operations (dispatch_*, combine_*, barrier) come from one thread at a time. attach, detach, set_mask and the
// queries may come from other threads meanwhile and must not disturb an operation in flight: what an operation sees of a
// peer is fixed when it first looks at that peer.
//
// Arguments have been judged (arguments.h): a path refuses only what it alone knows.
#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/fd.h"
#include "base/result.h"
#include "nixl/ep.h"

namespace nixl::core::ep {

using nixl::ep::CombineArgs;
using nixl::ep::Dispatch;
using nixl::ep::Fault;
using nixl::ep::View;

struct PathOptions {
  int rank = 0;
  nixl::ep::Combine combine = nixl::ep::Combine::kExact;
  Nanoseconds timeout_ns = 30'000'000'000;
  std::uint32_t incarnation = 0;  // of this rank; travels in every flag
  bool nvlink = true;
  int max_blocks = 0;  // most blocks of a kernel (CUDA: multiprocessors used); 0: all
};

struct Capacity {
  int num_ranks = 0;         // R_cap
  int experts_per_rank = 0;  // L
  std::int64_t num_bytes = 0;
};

// A rank's memory as a peer can map it: a description private to the path, and descriptors that travel beside it through a
// local socket. The same export serves every peer.
struct Export {
  std::string description;
  std::vector<Fd> descriptors;
};

// One end of a pair as both agree on it at connect.
struct PeerIdentity {
  int rank = -1;
  std::uint32_t incarnation = 0;
};

// The part of a path that membership uses. Any thread, also while operations run; never two calls for the same rank at once.
class PeerMemory {
 public:
  virtual ~PeerMemory() = default;
  virtual Result<Export> export_memory() = 0;
  // Maps a peer's memory and clears what an earlier connection with this rank left in our control words: both sides start to
  // count, from zero or from what their exports say. The peer starts masked; nothing is written to it before set_mask(rank, false).
  virtual Result<void> attach(const PeerIdentity& peer, Export memory) = 0;
  // Unmaps after every operation that may touch the peer has passed. Works for dead peers.
  virtual Result<void> detach(int rank) = 0;
};

class Path : public PeerMemory {
 public:
  // First call allocates; later ones may grow num_ranks or num_bytes. Existing peers stay attached.
  virtual Result<void> reserve(const Capacity& capacity) = 0;

  virtual Result<void> set_mask(std::span<const int> ranks, bool masked, void* stream) = 0;
  virtual Result<void> query_masks(std::int32_t* out, void* stream) const = 0;

  virtual Result<void> dispatch(const Dispatch& args) = 0;
  virtual Result<void> dispatch_send(const Dispatch& args) = 0;
  virtual Result<void> dispatch_recv(const Dispatch& args) = 0;
  virtual Result<void> combine(const CombineArgs& args) = 0;
  virtual Result<void> combine_send(const CombineArgs& args) = 0;
  virtual Result<void> combine_recv(const CombineArgs& args) = 0;
  virtual Result<void> barrier(void* stream) = 0;

  virtual Result<View> next_combine_buffer(std::int64_t max_tokens, std::int64_t hidden, int num_ranks) = 0;
  virtual View data_memory() const = 0;
  virtual View fault_view() const = 0;
  virtual std::vector<Fault> take_faults() = 0;
  virtual std::string take_input_error() = 0;

  // Wakes whoever waits and waits for the device; afterwards only destruction is allowed.
  virtual Result<void> close() = 0;
};

Result<std::unique_ptr<Path>> open_cpu_path(const PathOptions& options);
// In a build without kernels, or without a driver or device: kUnsupported with the reason.
Result<std::unique_ptr<Path>> open_cuda_path(const PathOptions& options);
std::string cuda_unavailable_reason();  // "" when it can be opened

}  // namespace nixl::core::ep
