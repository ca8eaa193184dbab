#include "backends/libfabric/rail.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>

namespace nixl::core::libfabric {
namespace {

constexpr std::uint64_t kAccess = FI_READ | FI_WRITE | FI_REMOTE_READ | FI_REMOTE_WRITE | FI_SEND | FI_RECV;

}  // namespace

Result<std::unique_ptr<Rail>> Rail::open(const Api& api, Info info, unsigned index, bool delivery_complete) {
  std::unique_ptr<Rail> rail(new Rail(api, std::move(info), index));
  NIXL_TRY(rail->start(delivery_complete));
  return rail;
}

Error Rail::error(const char* what, long status) const {
  return fabric_error(*api_, std::string(what) + " of " + label(), status);
}

Result<void> Rail::start(bool delivery_complete) {
  write_flags_ = FI_COMPLETION | (delivery_complete ? FI_DELIVERY_COMPLETE : 0);
  if (info_->fabric_attr->name) fabric_name_ = info_->fabric_attr->name;
  if (const long status = api_->fabric(info_->fabric_attr, &fabric_, nullptr)) return fail(error("fabric", status));
  if (const long status = fi_domain(fabric_, info_.get(), &domain_, nullptr)) return fail(error("domain", status));
  NIXL_TRY(open_queue());
  fi_av_attr table{};
  table.type = info_->domain_attr->av_type;
  if (const long status = fi_av_open(domain_, &table, &peers_, nullptr)) return fail(error("address table", status));
  if (const long status = fi_endpoint(domain_, info_.get(), &endpoint_, nullptr))
    return fail(error("endpoint", status));
  if (const long status = fi_ep_bind(endpoint_, &peers_->fid, 0)) return fail(error("endpoint", status));
  if (const long status = fi_ep_bind(endpoint_, &queue_->fid, FI_TRANSMIT | FI_RECV))
    return fail(error("endpoint", status));
  if (const long status = fi_enable(endpoint_)) return fail(error("start", status));
  std::size_t size = 0;
  (void)fi_getname(&endpoint_->fid, nullptr, &size);  // says how much room it takes
  address_.resize(size);
  if (const long status = fi_getname(&endpoint_->fid, address_.data(), &size)) return fail(error("address", status));
  address_.resize(size);
  return {};
}

// Sleeping takes a descriptor; providers without one are looked at from time to time.
Result<void> Rail::open_queue() {
  fi_cq_attr attributes{};
  attributes.size = std::max<std::size_t>(info_->tx_attr->size + info_->rx_attr->size, 1024);
  attributes.format = FI_CQ_FORMAT_MSG;
  attributes.wait_obj = FI_WAIT_FD;
  if (fi_cq_open(domain_, &attributes, &queue_, nullptr) == 0) {
    if (fi_control(&queue_->fid, FI_GETWAIT, &wait_fd_) == 0) return {};
    wait_fd_ = -1;
    fi_close(&queue_->fid);
    queue_ = nullptr;
  }
  attributes.wait_obj = FI_WAIT_NONE;
  if (const long status = fi_cq_open(domain_, &attributes, &queue_, nullptr))
    return fail(error("completion queue", status));
  return {};
}

void Rail::stop() noexcept {
  if (endpoint_) fi_close(&endpoint_->fid);
  endpoint_ = nullptr;
}

Rail::~Rail() {
  stop();
  if (queue_) fi_close(&queue_->fid);
  if (peers_) fi_close(&peers_->fid);
  if (domain_) fi_close(&domain_->fid);
  if (fabric_) fi_close(&fabric_->fid);
}

std::string Rail::label() const {
  const std::string provider = info_->fabric_attr->prov_name ? info_->fabric_attr->prov_name : "?";
  const char* const device = info_->domain_attr->name;
  return device && provider != device ? provider + "/" + device : provider;
}

bool Rail::addresses_are_tcp_ports() const noexcept {
  const std::string_view provider = info_->fabric_attr->prov_name ? info_->fabric_attr->prov_name : "";
  return provider.starts_with("tcp") || provider == "net" || provider == "sockets";
}

std::uint64_t Rail::gbits() const noexcept {
  const bool known = info_->nic && info_->nic->link_attr;
  return known ? info_->nic->link_attr->speed / 1'000'000'000 : 0;
}

Result<std::unique_ptr<Mapping>> Rail::map_locked(const Region& region) {
  const iovec range{reinterpret_cast<void*>(region.address), std::max<std::uint64_t>(region.length, 1)};
  fi_mr_attr attributes{};
  attributes.mr_iov = &range;
  attributes.iov_count = 1;
  attributes.access = kAccess;
  attributes.requested_key = next_key_++;  // never used twice: a key that was revoked stays so
  if (region.kind == MemKind::kVram) {
    attributes.iface = FI_HMEM_CUDA;
    attributes.device.cuda = static_cast<int>(region.device);
  }
  fid_mr* handle = nullptr;
  long status = fi_mr_regattr(domain_, &attributes, 0, &handle);
  if (status == 0 && (info_->domain_attr->mr_mode & FI_MR_ENDPOINT) != 0) {
    status = fi_mr_bind(handle, &endpoint_->fid, 0);
    if (status == 0) status = fi_mr_enable(handle);
    if (status != 0) fi_close(&handle->fid);
  }
  if (status != 0) {
    char what[128];
    std::snprintf(what, sizeof what, "register %s 0x%llx of %llu bytes with %s", name(region.kind),
                  static_cast<unsigned long long>(region.address), static_cast<unsigned long long>(region.length),
                  label().c_str());
    return fail(fabric_error(*api_, what, status));
  }
  const bool by_address = (info_->domain_attr->mr_mode & FI_MR_VIRT_ADDR) != 0;
  return std::make_unique<Mapping>(handle, by_address ? 0 : region.address);
}

// libfabric reads as many bytes as the format says, whatever it is given.
Result<void> Rail::check_address(std::string_view address) const {
  const bool text = info_->addr_format == FI_ADDR_STR;
  if (address.empty() || (text ? address.back() != '\0' : address.size() != address_.size()))
    return fail(Code::kMismatch, "an address of %zu bytes is none of %s", address.size(), label().c_str());
  if (info_->addr_format == FI_SOCKADDR_IN || info_->addr_format == FI_SOCKADDR_IN6 ||
      info_->addr_format == FI_SOCKADDR)
    if (std::memcmp(address.data(), address_.data(), sizeof(sa_family_t)) != 0)
      return fail(Code::kMismatch, "an address of another family than that of %s", label().c_str());
  return {};
}

Result<fi_addr_t> Rail::insert_locked(std::string_view address) {
  NIXL_TRY(check_address(address));
  fi_addr_t peer = FI_ADDR_UNSPEC;
  const int inserted = fi_av_insert(peers_, address.data(), 1, &peer, 0, nullptr);
  if (inserted != 1 || peer == FI_ADDR_UNSPEC)
    return fail(fabric_error(*api_, "address of a peer with " + label(), inserted < 0 ? inserted : FI_EADDRNOTAVAIL));
  return peer;
}

void Rail::remove_locked(fi_addr_t peer) {
  (void)fi_av_remove(peers_, &peer, 1, 0);  // nothing could be done about it
}

long Rail::write_locked(const Piece& piece, Operation& operation) {
  iovec local{piece.local, piece.length};
  fi_rma_iov remote{piece.remote, piece.length, piece.key};
  void* descriptor = piece.descriptor;
  const fi_msg_rma message{&local, &descriptor, 1, piece.peer, &remote, 1, &operation.context, 0};
  return fi_writemsg(endpoint_, &message, write_flags_);
}

long Rail::read_locked(const Piece& piece, Operation& operation) {
  return fi_read(endpoint_, piece.local, piece.length, piece.descriptor, piece.peer, piece.remote, piece.key,
                 &operation.context);
}

long Rail::send_locked(const void* bytes, std::size_t length, void* descriptor, fi_addr_t peer, Operation& operation) {
  return fi_send(endpoint_, bytes, length, descriptor, peer, &operation.context);
}

long Rail::receive_locked(void* bytes, std::size_t length, void* descriptor, Operation& operation) {
  return fi_recv(endpoint_, bytes, length, descriptor, FI_ADDR_UNSPEC, &operation.context);
}

int Rail::poll_locked(Completion* out, int most) {
  std::array<fi_cq_msg_entry, 64> entries;
  const long got = fi_cq_read(queue_, entries.data(), static_cast<std::size_t>(most));
  if (got > 0) {
    for (long i = 0; i < got; ++i) out[i] = {reinterpret_cast<Operation*>(entries[i].op_context), entries[i].len, 0};
    return static_cast<int>(got);
  }
  if (got != -FI_EAVAIL) return 0;
  fi_cq_err_entry failed{};
  if (fi_cq_readerr(queue_, &failed, 0) != 1) return 0;
  out[0] = {reinterpret_cast<Operation*>(failed.op_context), failed.len, failed.err ? failed.err : FI_EOTHER};
  return 1;
}

bool Rail::may_sleep_locked() {
  if (wait_fd_ < 0) return true;  // the caller sleeps for a moment only
  fid* const queue = &queue_->fid;
  fid* list[] = {queue};
  return fi_trywait(fabric_, list, 1) == FI_SUCCESS;
}

}  // namespace nixl::core::libfabric
