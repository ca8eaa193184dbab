// Expert-parallel dispatch and combine over a group of ranks that grows, shrinks and survives a killed member.
//
// A Buffer is one rank's membership in such a group. It owns the memory that peers write to or read from, knows who is
// connected and who is masked, and runs the operations. Tensors stay with the caller: operations take plain pointers.
//
// Terms. R_cap: rank capacity; L: experts a rank, fixed for life; expert id e lives at rank e / L; R: ranks covered by one
// call's outputs; M: most tokens a rank may send in the call; T = R * M rows for each local expert; H: hidden size;
// K: top-k; n: tokens of this call.
//
// Threads: connect, disconnect, mask calls and queries may run on any thread while another one runs operations; the
// operations themselves (dispatch_*, combine_*, barrier) are issued by one thread at a time, in the same order on all ranks.
// Errors: every member throws nixl::ep::Error; after any error the buffer stays usable unless it was destroyed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(_WIN32)
#error "Linux only"
#endif
#ifndef NIXL_EXPORT
#define NIXL_EXPORT __attribute__((visibility("default")))
#endif

namespace nixl::ep {

class NIXL_EXPORT Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Device : int { kCpu = 0, kCuda = 1 };

// How a token's contributions are summed. kExact: the owner adds w_k * row_k in k order in fp32 and rounds once.
// kReduced: the rows of one token held by one rank are weighed and summed there (k order, fp32, one rounding to bf16),
// the owner adds these partial rows in rank order (fp32, one rounding).
enum class Combine : int { kExact = 0, kReduced = 1 };

// What travels in dispatch. Groups of 128 channels share a scale.
enum class Payload : int {
  kBf16 = 0,
  kFp8 = 1,       // scale = amax / 448, fp32
  kFp8Pow2 = 2,   // scale = 2^ceil(log2(amax / 448)), fp32
  kFp8Ue8m0 = 3,  // the same, stored as biased exponent bytes, four to an int32
};

enum class Phase : int { kDispatch = 0, kCombine = 1, kBarrier = 2 };

// A peer that did not keep a deadline, or whose flag did not fit. `operation` counts this rank's operations.
struct Fault {
  int rank = -1;
  std::uint64_t operation = 0;
  Phase phase = Phase::kDispatch;
  std::uint64_t expected = 0;  // flag word waited for: sender's incarnation << 32 | its count of operations sent here
  std::uint64_t seen = 0;      // flag word found when the deadline passed
};

// A key-value store for rendezvous, such as torch's TCPStore. Calls may block up to the given time; called from the thread
// that runs connect(). May throw: the text becomes part of the error of connect().
class NIXL_EXPORT Store {
 public:
  virtual ~Store() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  // Waits until the key exists; false when it does not within the time.
  virtual bool wait(const std::string& key, std::int64_t timeout_ms) = 0;
  virtual std::string get(const std::string& key) = 0;  // of an existing key
  virtual void remove(const std::string& key) = 0;      // absent keys are no error
};

struct Options {
  int rank = 0;
  Device device = Device::kCpu;
  Combine combine = Combine::kExact;
  std::int64_t timeout_ms = 30'000;  // limit of every wait for a peer inside an operation; 0: do not wait
  std::int64_t connect_timeout_ms = 300'000;
  bool nvlink = true;  // CUDA: use NVLink between GPUs of one host
};

// Inputs and outputs of one dispatch. Pointers are on the buffer's device. stream: a cudaStream_t, ignored on the CPU.
struct Dispatch {
  const void* x = nullptr;              // bf16 [n, H], contiguous
  std::int64_t num_tokens = 0;          // n, 0 <= n <= M
  std::int64_t hidden = 0;              // H: multiple of 128 (of 8 for Payload::kBf16)
  const void* topk_idx = nullptr;       // int32 or int64 [n, K]; negative: skip
  int topk = 0;                         // K, 1 .. 32
  int index_bytes = 8;                  // 4 or 8
  const float* topk_weights = nullptr;  // optional fp32 [n, K], on all ranks or on none: see recv_weights
  std::int64_t max_tokens = 0;          // M
  int num_ranks = 0;                    // R
  Payload payload = Payload::kBf16;
  // Outputs; rows past the count are left untouched.
  void* recv_x = nullptr;                // [L, T, H] bf16 or fp8 (e4m3) bytes
  void* recv_scales = nullptr;           // fp32 [L, H/128, T] (or int32 [L, H/512, T] for ue8m0): row index innermost
  std::int32_t* recv_count = nullptr;    // [L]
  std::int32_t* src_info = nullptr;      // [L, T] token index at the source
  std::int64_t* layout_range = nullptr;  // [L, R] first row << 32 | count
  // Optional: the place of each row in its token's top-k, and (only with places and topk_weights) its weight. Handed to
  // combine, weights let it sum rows in its send phase.
  float* recv_weights = nullptr;        // [L, T]
  std::uint8_t* recv_places = nullptr;  // [L, T]
  void* records = nullptr;              // record_bytes() of memory that the combines of this dispatch get; CUDA only
  std::int32_t* recv_stats = nullptr;   // optional [L], counts are added
  std::int64_t* wait_cost = nullptr;    // optional [R], time waited for each source is added (ns; CUDA: clock cycles)
  void* stream = nullptr;
};

struct CombineArgs {
  const void* x = nullptr;      // bf16 [L, T, H]; ignored with zero_copy
  std::int64_t num_tokens = 0;  // n of the owner's dispatch
  std::int64_t hidden = 0;
  const void* topk_idx = nullptr;  // as in dispatch
  int topk = 0;
  int index_bytes = 8;
  const float* topk_weights = nullptr;         // fp32 [n, K]
  const std::int32_t* src_info = nullptr;      // from dispatch
  const std::int64_t* layout_range = nullptr;  // from dispatch
  const float* recv_weights = nullptr;         // from dispatch, optional; without them and with sends_only a combine is
  const std::uint8_t* recv_places = nullptr;   //   exact whatever Options::combine says
  const void* records = nullptr;               // from dispatch; CUDA only
  std::int64_t max_tokens = 0;                 // M of the handle
  int num_ranks = 0;                           // R of the handle
  bool zero_copy = false;                      // rows are in the buffer of next_combine_buffer()
  bool logfmt = false;                         // compress rows on the wire
  bool sends_only = false;  // the receive phase is called apart (hook): no phase may wait for a peer before it
  void* out = nullptr;      // bf16 [n, H]
  std::int64_t* wait_cost = nullptr;
  void* stream = nullptr;
};

// A view into device memory: address, and strides in elements. Whoever holds `owner` may use the memory also after destroy().
struct View {
  void* data = nullptr;
  std::int64_t shape[3] = {0, 0, 0};
  std::int64_t stride[3] = {0, 0, 0};
  std::shared_ptr<const void> owner;
};

// Bytes that update_memory() needs so that every call with up to (max_tokens, hidden) works on a buffer of num_experts
// experts in all. Positive, a multiple of 128, linear in max_tokens and in hidden, independent of num_ranks.
NIXL_EXPORT std::int64_t size_hint(std::int64_t max_tokens, std::int64_t hidden, int num_ranks, int num_experts);

// Bytes of Dispatch::records for a dispatch of these bounds; 0 on the CPU.
NIXL_EXPORT std::int64_t record_bytes(Device device, std::int64_t max_tokens, int topk, int num_ranks);

// Why Device::kCuda cannot be used here ("" when it can): no kernels in this build, no driver, no device.
NIXL_EXPORT std::string cuda_unavailable_reason();

class NIXL_EXPORT Buffer {
 public:
  explicit Buffer(const Options& options);
  ~Buffer();  // as destroy(); never throws
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // Allocates for `num_ranks` ranks of `experts_per_rank` experts. A later call may raise num_ranks and num_bytes only.
  void update_memory(int num_ranks, int experts_per_rank, std::int64_t num_bytes);
  // The store for coming connects; null: none. Keys are written under "NIXL_EP/".
  void set_store(std::shared_ptr<Store> store);
  // Symmetric: returns when every listed rank has named this one too. All or nothing: on failure or timeout the error
  // names the missing ranks and nothing of the new ranks is left. activate: unmask them at once. Own rank and ranks that
  // are connected already are passed over; returns those that this call connected.
  std::vector<int> connect(const std::vector<int>& ranks, bool activate);
  // Local; also for dead peers. Returns when running operations have passed the peers and their memory is released.
  void disconnect(const std::vector<int>& ranks);
  // Local. Operations that were queued may end first, up to a second, at most the timeout: peers count on what they send.
  void destroy();

  // Phases of an operation. dispatch_send never waits for a peer; dispatch_recv fills the outputs. On CUDA they launch
  // kernels on the given stream; `dispatch` is both in one launch. A receive phase runs once, before the next operation begins, on
  // CUDA also before a barrier.
  void dispatch(const Dispatch& args);
  void dispatch_send(const Dispatch& args);
  void dispatch_recv(const Dispatch& args);
  void combine(const CombineArgs& args);
  void combine_send(const CombineArgs& args);
  void combine_recv(const CombineArgs& args);
  void barrier(void* stream);

  // Memory the caller may fill with the rows of the next combine (zero_copy): bf16 [L, T, H].
  View next_combine_buffer(std::int64_t max_tokens, std::int64_t hidden, int num_ranks);
  // Memory of this buffer that the caller may overwrite at any time between operations; nothing in flight lies in it, so ranks may
  // do so at different times. At most num_bytes.
  View data_memory() const;

  void mask(const std::vector<int>& ranks, bool masked, void* stream);
  void clean_masks(void* stream);
  // int32 [R_cap] on the buffer's device: 0 active, 1 masked, -1 never connected.
  void query_masks(std::int32_t* out, void* stream) const;
  std::vector<int> active_ranks() const;     // by the host: unmasked by the API, timeouts not counted
  std::vector<int> connected_ranks() const;  // without this rank
  int active_rank_bound() const;             // highest active rank + 1
  // Faults since the last call; clears them. Does not wait for the device.
  std::vector<Fault> take_faults();
  // Which operation met an expert id of R * L or above, or more rows than fit, and what it dropped; said once, then "".
  std::string take_input_error();
  // int32 [R_cap] on the device: nonzero = failed in the newest operation.
  View fault_view() const;
  std::uint64_t incarnation() const;  // of this rank, unique in the life of the group

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace nixl::ep
