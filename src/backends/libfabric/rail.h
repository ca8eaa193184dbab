// One network device in use: a domain with one endpoint that reaches any number of peers, and memory registered with it.
// Functions named *_locked need the backend's lock; libfabric is told that no two threads enter it at once.
#pragma once
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_rma.h>

#include <memory>
#include <string>
#include <string_view>

#include "backends/libfabric/provider.h"
#include "contract/memory.h"

namespace nixl::core::libfabric {

class Job;
class Rail;
struct Frame;

// What libfabric hands back when an operation completes. Lives until then.
struct Operation {
  fi_context2 context{};   // first: its address is what libfabric is given; some providers write into it
  Job* job = nullptr;      // of data; null when nobody is interested any more
  Frame* frame = nullptr;  // of messages
  unsigned rail = 0;
  bool counted = false;  // among those in flight
};

struct Completion {
  Operation* operation = nullptr;
  std::size_t length = 0;
  long error = 0;  // FI_*; 0: done
};

// A range registered with one rail until destroyed, which needs the lock.
class Mapping {
 public:
  Mapping(fid_mr* handle, std::uint64_t base) : handle_(handle), base_(base) {}
  ~Mapping() { fi_close(&handle_->fid); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  std::uint64_t key() const noexcept { return fi_mr_key(handle_); }
  std::uint64_t base() const noexcept { return base_; }  // what remote addresses are counted from
  void* descriptor() const noexcept { return fi_mr_desc(handle_); }

 private:
  fid_mr* handle_;
  std::uint64_t base_;
};

class Rail {
 public:
  static Result<std::unique_ptr<Rail>> open(const Api& api, Info info, unsigned index, bool delivery_complete);
  ~Rail();
  // Ends what is under way: from now on no buffer is used. Nothing else may be called but the destructor.
  void stop() noexcept;
  Rail(const Rail&) = delete;
  Rail& operator=(const Rail&) = delete;

  Result<std::unique_ptr<Mapping>> map_locked(const Region& region);
  // An address as address() of another rail gives it.
  Result<fi_addr_t> insert_locked(std::string_view address);
  void remove_locked(fi_addr_t peer);

  // One piece of data, and where it goes or comes from.
  struct Piece {
    void* local = nullptr;
    std::uint64_t length = 0, remote = 0, key = 0;
    void* descriptor = nullptr;
    fi_addr_t peer = FI_ADDR_UNSPEC;
  };
  // 0: under way. -FI_EAGAIN: not now. Anything else: refused.
  long write_locked(const Piece& piece, Operation& operation);
  long read_locked(const Piece& piece, Operation& operation);
  long send_locked(const void* bytes, std::size_t length, void* descriptor, fi_addr_t peer, Operation& operation);
  long receive_locked(void* bytes, std::size_t length, void* descriptor, Operation& operation);

  // Completions that are there, at most `most` (<= 64); they drive the rail, too.
  int poll_locked(Completion* out, int most);
  // -1: nothing can be waited for, only looked at.
  int wait_fd() const noexcept { return wait_fd_; }
  bool may_sleep_locked();

  const std::string& address() const noexcept { return address_; }
  const std::string& fabric() const noexcept { return fabric_name_; }
  std::uint32_t address_format() const noexcept { return info_->addr_format; }
  bool addresses_are_tcp_ports() const noexcept;
  unsigned index() const noexcept { return index_; }
  std::string label() const;  // "tcp;ofi_rxm/eth0"
  bool maps_local_memory() const noexcept { return (info_->domain_attr->mr_mode & FI_MR_LOCAL) != 0; }
  std::uint64_t most_bytes() const noexcept { return info_->ep_attr->max_msg_size; }
  std::uint64_t gbits() const noexcept;  // 0: not known
  const Api& api() const noexcept { return *api_; }

 private:
  Rail(const Api& api, Info info, unsigned index) : api_(&api), info_(std::move(info)), index_(index) {}
  Result<void> start(bool delivery_complete);
  Result<void> open_queue();
  Result<void> check_address(std::string_view address) const;
  Error error(const char* what, long status) const;

  const Api* api_;
  Info info_;
  const unsigned index_;
  fid_fabric* fabric_ = nullptr;
  fid_domain* domain_ = nullptr;
  fid_av* peers_ = nullptr;
  fid_cq* queue_ = nullptr;
  fid_ep* endpoint_ = nullptr;
  int wait_fd_ = -1;
  std::uint64_t write_flags_ = 0, next_key_ = 1;
  std::string address_, fabric_name_;
};

}  // namespace nixl::core::libfabric
