// The UCX library, opened at run time: one table of the functions used, typed by UCX's own headers.
#pragma once
#include <ucp/api/ucp.h>

#include <string>

#include "base/result.h"

namespace nixl::core::ucx {

// clang-format lays this list out anew each time it runs.
// clang-format off
#define NIXL_UCP_FUNCTIONS(X) \
  X(init_version) X(cleanup) X(config_read) X(config_modify) X(config_release) X(get_version_string) \
  X(worker_create) X(worker_destroy) X(worker_query) X(worker_progress) X(worker_get_efd) X(worker_arm) \
  X(worker_release_address) X(worker_set_am_recv_handler) X(ep_create) X(ep_close_nbx) X(ep_query) \
  X(ep_evaluate_perf) X(ep_flush_nbx) X(ep_rkey_unpack) X(mem_map) X(mem_unmap) X(mem_query) X(rkey_pack) \
  X(rkey_buffer_release) X(rkey_destroy) X(put_nbx) X(get_nbx) X(am_send_nbx) X(request_check_status) \
  X(request_free)
// clang-format on

struct Api {
#define NIXL_UCP_MEMBER(name) decltype(&::ucp_##name) name = nullptr;
  NIXL_UCP_FUNCTIONS(NIXL_UCP_MEMBER)
#undef NIXL_UCP_MEMBER
  decltype(&::ucs_status_string) status_string = nullptr;

  std::string path;    // the file that was opened
  std::string remark;  // why this one, and what it lacks on this machine; may be empty
};

// Opens the library at the first call and keeps it for the life of the process. Which one: NIXL_UCX_LIBRARY; else the
// system's when an RDMA device exists; else the libucx package beside ours; else the system's.
// kUnsupported: the reason names every place tried with the loader's words. Thread-safe.
Result<const Api*> open_api();

// "what: <UCX's text> (-25)".
Error ucx_error(const Api& api, std::string_view what, ucs_status_t status, Code code = Code::kIo);

// The same for an operation on an endpoint: kPeerLost where the status says that the endpoint is broken.
Error operation_error(const Api& api, std::string_view what, ucs_status_t status);

// True when an RDMA (verbs) device is present.
bool have_rdma_device();
// True when an NVIDIA driver and a device are present; initialises nothing.
bool have_cuda_device();

}  // namespace nixl::core::ucx
