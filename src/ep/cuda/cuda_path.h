// The path between GPUs of one NVLink domain: kernels that push rows into peers' memory (docs/decisions/0020-ep-cuda-lines.md).
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "device/cuda/memory.h"
#include "ep/cuda/launch.h"
#include "ep/path.h"

namespace nixl::core::ep {

class CudaPath final : public Path {
 public:
  static Result<std::unique_ptr<Path>> open(const PathOptions& options);
  ~CudaPath() override;

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
  struct PeerMapping {
    DeviceSpan control, data;
  };
  // What a peer says about its memory (export_memory).
  struct Announcement {
    std::string gpu;  // uuid
    std::uint32_t first_count = 0;
    std::vector<std::int64_t> chunks[2];  // bytes of control and data
  };

  explicit CudaPath(const PathOptions& options) : options_(options) {}
  Result<void> allocate();
  Result<void> prepare_kernels();
  Result<gpu::Op> op_of(int num_ranks, nixl::ep::Phase phase, int parts) const;
  Result<void> check_turn(nixl::ep::Phase phase, const void* output, int parts) const;
  Result<void> dispatch_parts(const Dispatch& args, int parts);
  Result<void> combine_parts(const CombineArgs& args, int parts);
  Result<RowShape> shape_of(std::int64_t row_bytes, std::int64_t tokens, int wanted_per, int chunk_words,
                            int meta_words) const;
  Result<void> launch_operation(const void* kernel, int grid, int threads, std::int64_t shared, void* args,
                                void* stream);
  Result<void> launch(const void* kernel, int grid, int threads, std::int64_t shared, void* args, void* stream);
  Result<void> change_peers(std::span<const gpu::PeerChange> changes, cudaStream_t stream);
  Result<void> change_apart(std::span<const gpu::PeerChange> changes);
  Result<void> follow_operations(cudaStream_t stream);
  Result<void> let_operations_end(Deadline end);
  Result<Announcement> read_announcement(int rank, std::string_view description) const;
  Result<PeerMapping> map_peer(int rank, const Announcement& said, std::vector<Fd> descriptors) const;
  Result<void> forget_source(int rank);
  int grid_for(std::int64_t items) const;

  const PathOptions options_;
  int device_ = 0;
  int num_blocks_ = 0;  // most that run at once
  int lanes_ = 8;
  std::string gpu_;           // uuid
  mutable std::mutex mutex_;  // membership, growth, zero-copy memory
  Capacity capacity_;
  bool closed_ = false;
  PushLayout layout_;
  PushControl words_;
  DeviceSpan control_, data_;
  gpu::State* state_ = nullptr;
  gpu::HostPage* page_ = nullptr;
  gpu::HostPage* page_on_device_ = nullptr;
  std::mutex faults_mutex_;  // apart: nobody who asks for faults waits for a change of peers
  unsigned long long faults_taken_ = 0;
  cudaStream_t stream_ = nullptr;       // for changes of peers
  cudaStream_t idle_stream_ = nullptr;  // where detach waits: changes must not wait with it
  cudaEvent_t event_ = nullptr;
  std::atomic<void*> last_stream_{nullptr};  // of the newest operation
  std::atomic<bool> has_last_stream_{false};
  std::atomic<int> last_experts_{0}, last_tokens_{0};  // bounds of the newest dispatch
  // A send phase whose receive phase is still to come, known by the output of its call.
  struct Sent {
    nixl::ep::Phase phase;
    const void* output;
  };
  std::optional<Sent> sent_;
  std::uint32_t first_count_ = 1;  // of connections made with the newest export
  void* exposed_ = nullptr;        // what clients may overwrite
  std::int64_t exposed_bytes_ = 0;
  std::shared_ptr<void> zero_copy_;
  std::int64_t zero_copy_bytes_ = 0;
  std::map<int, PeerMapping> peers_;
  std::vector<PeerMapping> kept_;  // of detached peers that operations would not let go of
};

}  // namespace nixl::core::ep
