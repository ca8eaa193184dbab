// The agent: moves registered memory, files and objects between processes through plug-in backends.
//
//   nixl::Agent agent("worker0");                                  // backend UCX unless configured otherwise
//   std::vector<nixl::MemDescriptor> descs = {{buffer, size, 0}};
//   auto memory = agent.registerMemory(descs);
//   agent.addRemoteAgent(bytes_from_the_peer);                     // its getMetadata()
//   auto transfer = agent.prepareTransfer(nixl::OpType::WRITE, descs, remote_descs, "worker1");
//   agent.postTransfer(transfer);
//   while (agent.checkTransfer(transfer) != nixl::XferState::DONE) {}
//
// Threads: every member may be called from any thread at any time, except the destructor. Handles are values: copies stand for
// one request, double release does nothing, and handles may outlive the agent.
// Errors: every member throws nixl::Error (constructors also std::invalid_argument for an empty name); nothing returns an error
// state. Nothing waits for a peer but makeConnection and waitTransfer.
#pragma once
#include <nixl/descs.h>
#include <nixl/export.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace nixl {

enum class OpType : int { READ = 0, WRITE = 1 };
enum class XferState : int { DONE = 0, PROC = 1, NOT_POSTED = -1, ERR = -3 };
enum class SyncMode : int { NONE = 0, STRICT = 1, RW = 2, DEFAULT = NONE };

// code(): the status number, -1 NOT_POSTED, -2 INVALID_PARAM, -3 BACKEND, -4 NOT_FOUND, -5 MISMATCH, -6 NOT_ALLOWED,
// -7 REPOST_ACTIVE, -8 UNKNOWN, -9 NOT_SUPPORTED, -10 REMOTE_DISCONNECT, -11 CANCELED, -12 NO_TELEMETRY. what(): its name, then
// the reason.
class NIXL_EXPORT Error : public std::runtime_error {
 public:
  Error(int code, const std::string& reason);
  int code() const noexcept { return code_; }
  const std::string& reason() const noexcept { return reason_; }
  static const char* nameOf(int code) noexcept;  // "NIXL_ERR_NOT_FOUND"

 private:
  int code_;
  std::string reason_;
};
[[noreturn]] NIXL_EXPORT void throwInvalid(const std::string& reason);

namespace detail {
template <class T>
std::uint64_t number(T value, const char* what) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<std::uintptr_t>(value);
  } else if constexpr (std::is_null_pointer_v<T>) {
    return 0;
  } else {
    static_assert(std::is_integral_v<T> || std::is_enum_v<T>, "a pointer or an integer is needed");
    if constexpr (std::is_signed_v<T>)
      if (value < 0) throwInvalid(std::string(what) + " is " + std::to_string(value) + "; it cannot be negative");
    return static_cast<std::uint64_t>(value);
  }
}
}  // namespace detail

struct MemDescriptor {
  std::uintptr_t addr = 0;  // FILE, BLOCK, OBJECT: byte offset
  std::size_t len = 0;
  std::uint64_t dev_id = 0;  // VRAM: GPU ordinal; FILE: descriptor
  MemType type = MemType::DRAM;
  std::string meta;  // file path spec, object key

  MemDescriptor() = default;
  template <class A, class L, class D>
  MemDescriptor(A addr_, L len_, D dev_id_, MemType type_ = MemType::DRAM, std::string meta_ = {})
      : addr(static_cast<std::uintptr_t>(detail::number(addr_, "address"))),
        len(detail::number(len_, "length")),
        dev_id(detail::number(dev_id_, "device id")),
        type(type_),
        meta(std::move(meta_)) {}
};

using Params = std::unordered_map<std::string, std::string>;
using Notifs = std::unordered_map<std::string, std::vector<std::string>>;

struct AgentConfig {
  std::vector<std::string> backends = {"UCX"};  // those not available are skipped with a warning
  std::unordered_map<std::string, Params> backend_params;
  bool enable_prog_thread = true;
  bool enable_listen = false;
  std::uint16_t listen_port = 8888;  // 0: any free one
  std::optional<bool> use_etcd;  // true: publish and discover by itself; false: no etcd; nullopt: explicit calls only
  bool capture_telemetry = false;
  unsigned num_threads = 0;
  std::optional<SyncMode> sync_mode;  // accepted; every mode is safe from any thread
  std::chrono::microseconds etcd_watch_timeout{5'000'000};
};

class AgentImpl;
struct XferRecord;
struct RegRecord;

class NIXL_EXPORT RegHandle {
 public:
  RegHandle() = default;
  explicit operator bool() const noexcept { return record_ != nullptr; }

 private:
  friend class Agent;
  std::shared_ptr<RegRecord> record_;
};

class NIXL_EXPORT XferHandle {
 public:
  XferHandle() = default;
  explicit operator bool() const noexcept { return record_ != nullptr; }

 private:
  friend class Agent;
  std::shared_ptr<XferRecord> record_;  // the last copy releases the request
};

struct XferTelemetry {
  std::int64_t start_us = 0;     // CLOCK_MONOTONIC
  std::int64_t post_us = 0;      // time of the post call
  std::int64_t transfer_us = 0;  // post to completion; so far, while running
  std::uint64_t total_bytes = 0;
  std::uint64_t desc_count = 0;
  std::string backend;
};

struct CostEstimate {
  std::int64_t duration_us = 0;
  std::int64_t error_margin_us = 0;
};

class NIXL_EXPORT Agent {
 public:
  Agent(std::string name, AgentConfig config = {});
  ~Agent();  // at most five seconds
  Agent(const Agent&) = delete;
  Agent& operator=(const Agent&) = delete;
  const std::string& name() const noexcept;

  // Kinds may be mixed; all or nothing. Empty backend: every suitable one.
  RegHandle registerMemory(const std::vector<MemDescriptor>& descs, const std::string& backend = "");
  void deregisterMemory(const RegHandle& memory);
  // Each side has one kind. One descriptor against many of the same total length is cut in order.
  XferHandle prepareTransfer(OpType op, const std::vector<MemDescriptor>& local,
                             const std::vector<MemDescriptor>& remote, const std::string& remote_agent,
                             const std::string& backend = "", const std::string& notif = "");
  XferState postTransfer(const XferHandle& transfer);
  XferState checkTransfer(const XferHandle& transfer);
  // Blocks without spinning; PROC when the time is up.
  XferState waitTransfer(const XferHandle& transfer, std::chrono::milliseconds timeout);
  void releaseTransfer(const XferHandle& transfer);

  std::string getMetadata() const;
  // The peer's name. Older metadata of a peer undoes nothing of newer.
  std::string addRemoteAgent(const std::string& metadata);
  void removeRemoteAgent(const std::string& agent);
  bool checkRemoteMetadata(const std::string& agent);
  // By socket when an ip is given, else by the configured store. These return at once.
  void sendLocalMetadata(const std::string& ip = "", std::uint16_t port = 8888);
  void fetchRemoteMetadata(const std::string& agent, const std::string& ip = "", std::uint16_t port = 8888);
  void invalidateLocalMetadata(const std::string& ip = "", std::uint16_t port = 8888);
  void makeConnection(const std::string& remote_agent);
  void sendNotif(const std::string& remote_agent, const std::string& message);
  Notifs getNewNotifs();
  std::vector<std::string> pluginList() const;
  void createBackend(const std::string& backend, const Params& params = {});
  // A new descriptor, closed with the agent, that polls readable after a transfer ended or a message arrived; read it to clear.
  // Needs the progress thread.
  int eventFd();
  std::uint16_t listenPort() const noexcept;  // 0: not listening

  // ---- The batch interface: descriptors in columns, handles and backends as numbers. Same rules, no cost per descriptor
  // beyond its bytes; what the language bindings use. An empty list of backends stands for all of them.
  using Handle = std::uint64_t;     // never used twice by one agent; 0 is none
  using BackendId = std::uint32_t;  // from 1, in creation order
  using BackendIds = std::vector<BackendId>;

  BackendId addBackend(const std::string& backend, const Params& params = {});
  std::vector<std::pair<std::string, BackendId>> backendsHeld() const;  // in creation order
  Params backendParams(BackendId backend) const;
  std::vector<MemType> backendMems(BackendId backend) const;

  void registerDescs(const Descs& descs, const BackendIds& backends = {});
  void deregisterDescs(const Descs& descs, const BackendIds& backends = {});
  std::vector<std::optional<Params>> queryMemory(const Descs& descs, BackendId backend);

  Handle prepareDescs(const std::string& agent, Descs descs,
                      const BackendIds& backends = {});  // agent "": the local side
  void releaseDescs(Handle list);
  // Pair k: block local_index[k] with block remote_index[k]. `merge`: neighbours on both sides become one.
  struct Indices {
    const std::int64_t* data = nullptr;
    std::size_t size = 0;
  };
  Handle makeTransfer(OpType op, Handle local, Indices local_index, Handle remote, Indices remote_index,
                      std::optional<std::string> notif, const BackendIds& backends, bool merge);
  Handle makeTransfer(OpType op, Descs local, Descs remote, const std::string& agent, std::optional<std::string> notif,
                      const BackendIds& backends);
  XferState post(Handle transfer, const std::string* notif = nullptr);  // null keeps the notification given before
  XferState check(Handle transfer);
  XferState wait(Handle transfer, std::chrono::nanoseconds timeout);
  void cancel(Handle transfer);
  void release(Handle transfer);
  XferTelemetry telemetry(Handle transfer);
  CostEstimate estimateCost(Handle transfer);
  BackendId backendOf(Handle transfer);
  std::string pathOf(Handle transfer);  // for people: "shm", "tcp", "io_uring" ...

  std::string partialMetadata(const Descs& descs, bool connections, const BackendIds& backends) const;
  void sendPartialMetadata(const Descs& descs, bool connections, const BackendIds& backends, const std::string& ip,
                           std::uint16_t port, const std::string& label);
  void fetchLabelled(const std::string& agent, const std::string& ip, std::uint16_t port, const std::string& label);
  void requirePeer(const std::string& agent, const Descs* descs);  // throws NOT_FOUND when unknown or not covered
  void connect(const std::string& agent, const BackendIds& backends, std::chrono::nanoseconds timeout);
  void notify(const std::string& agent, const std::string& message, const BackendIds& backends);
  std::vector<std::pair<std::string, std::string>> drainNotifs(
      const BackendIds& backends);  // sender, message; in order
  // A device-readable table of memory for kernels; NOT_SUPPORTED where no backend offers it.
  Handle openView(const std::string& agent, const Descs& descs, const BackendIds& backends);

 private:
  std::shared_ptr<AgentImpl> impl_;
};

}  // namespace nixl
