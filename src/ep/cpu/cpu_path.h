// The path on a CPU: ranks of one host, as processes or as threads, over shared memory.
#pragma once
#include <atomic>
#include <mutex>
#include <vector>

#include "ep/cpu/combine.h"
#include "ep/cpu/dispatch.h"
#include "ep/cpu/exchange.h"
#include "ep/cpu/memory.h"
#include "ep/cpu/peers.h"
#include "ep/path.h"

namespace nixl::core::ep {

class CpuPath final : public Path {
 public:
  static Result<std::unique_ptr<Path>> open(const PathOptions& options);
  explicit CpuPath(const PathOptions& options);
  ~CpuPath() override;

  Result<void> reserve(const Capacity& capacity) override;
  Result<Export> export_memory() override;
  Result<void> attach(const PeerIdentity& peer, Export memory) override;
  Result<void> detach(int rank) override;
  Result<void> set_mask(std::span<const int> ranks, bool masked, void* stream) override;
  Result<void> query_masks(std::int32_t* out, void* stream) const override;

  Result<void> dispatch(const Dispatch& args) override;
  Result<void> dispatch_send(const Dispatch& args) override;
  Result<void> dispatch_recv(const Dispatch& args) override;
  Result<void> combine(const CombineArgs& args) override;
  Result<void> combine_send(const CombineArgs& args) override;
  Result<void> combine_recv(const CombineArgs& args) override;
  Result<void> barrier(void* stream) override;

  Result<View> next_combine_buffer(std::int64_t max_tokens, std::int64_t hidden, int num_ranks) override;
  View data_memory() const override;
  View fault_view() const override;
  std::vector<Fault> take_faults() override;
  std::string take_input_error() override;
  Result<void> close() override;

 private:
  enum class Pending { kNone, kDispatch, kCombine };
  class RunningPhase;

  Result<void> check_open() const;
  Result<void> send(const Dispatch& args);
  Result<void> recv(const Dispatch& args);
  Result<void> send(const CombineArgs& args);
  Result<void> recv(const CombineArgs& args);
  void begin_operation(nixl::ep::Phase phase, int num_ranks);
  void finish_pending();
  Setting setting() const;

  const PathOptions options_;
  mutable std::mutex memory_mutex_;  // capacity and export against growth
  Capacity capacity_;
  std::atomic<bool> closed_{false};
  std::vector<std::int32_t> fault_words_;
  mutable InputErrors errors_;
  mutable OwnMemory own_;
  PeerTable peers_;
  mutable Exchange exchange_;
  Exchange barrier_;
  Dispatcher dispatcher_;
  Combiner combiner_;
  std::uint64_t operations_ = 0;
  bool lent_ = false;  // the slot of the next operation was handed out, to be filled for a zero-copy combine
  Pending pending_ = Pending::kNone;
  Dispatch sent_dispatch_;  // of the pending operation: its receive phase must fit
  CombineArgs sent_combine_;
};

}  // namespace nixl::core::ep
