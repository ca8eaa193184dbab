#include "backends/ucx/context.h"

#include <algorithm>
#include <cstdlib>

#include "base/log.h"

namespace nixl::core::ucx {
namespace {

std::string asked_transports(const Options& options) {
  if (const char* text = std::getenv("UCX_TLS")) return text;
  std::string text;
  for (const auto& [key, value] : options.entries)
    if (key == "TLS") text = value;
  return text;
}

ucs_status_t init(const Api& api, ucp_config_t* config, ucp_context_h* handle) {
  ucp_params_t params{};
  params.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED;
  params.features = UCP_FEATURE_RMA | UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  params.mt_workers_shared = 1;  // registration and workers run on different threads
  return api.init_version(1, 13, &params, config, handle);
}

}  // namespace

Result<std::unique_ptr<Context>> Context::open(const Options& options) {
  std::unique_ptr<Context> context(new Context());
  NIXL_ASSIGN(context->api_, open_api());
  const Api& api = *context->api_;
  NIXL_ASSIGN(ucp_config_t* const config, make_config(api, options));
  const std::string tls = asked_transports(options);
  context->asked_ = tls.empty() ? "all transports" : "UCX_TLS=" + tls;

  ucs_status_t status = init(api, config, &context->handle_);
  if (status != UCS_OK && !tls.empty()) {
    // None of the transports asked for exists here. That shows when a peer is connected, so that an agent can be built
    // on any machine: only the transport to oneself is left.
    NIXL_WARN("%s: none of these transports is usable on this machine (%s); peers cannot be reached through UCX",
              context->asked_.c_str(), api.status_string(status));
    if (api.config_modify(config, "TLS", (tls + ",self").c_str()) == UCS_OK)
      status = init(api, config, &context->handle_);
  }
  api.config_release(config);
  if (status != UCS_OK)
    return fail(ucx_error(
        api,
        "open UCX context with " + context->asked_ + (options.devices.empty() ? "" : " on devices " + options.devices),
        status));
  return context;
}

Context::~Context() {
  if (handle_) api_->cleanup(handle_);
}

Result<std::unique_ptr<Memory>> Memory::open(const Context& context, const Region& region) {
  const Api& api = context.api();
  std::unique_ptr<Memory> memory(new Memory());
  memory->context_ = &context;
  ucp_mem_map_params_t params{};
  params.field_mask =
      UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH | UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE;
  params.address = reinterpret_cast<void*>(region.address);
  params.length = std::max<std::uint64_t>(region.length, 1);
  params.memory_type = region.kind == MemKind::kVram ? UCS_MEMORY_TYPE_CUDA : UCS_MEMORY_TYPE_HOST;
  char what[96];
  std::snprintf(what, sizeof what, "register %s 0x%llx of %llu bytes", name(region.kind),
                static_cast<unsigned long long>(region.address), static_cast<unsigned long long>(region.length));
  if (region.kind == MemKind::kVram) {
    // A pointer that the driver does not know as device memory must fail here, not at the first transfer.
    params.field_mask &= ~static_cast<std::uint64_t>(UCP_MEM_MAP_PARAM_FIELD_MEMORY_TYPE);
  }
  if (const ucs_status_t status = api.mem_map(context.handle(), &params, &memory->handle_); status != UCS_OK) {
    memory->handle_ = nullptr;
    return fail(ucx_error(api, what, status));
  }
  if (region.kind == MemKind::kVram) {
    ucp_mem_attr_t attributes{};
    attributes.field_mask = UCP_MEM_ATTR_FIELD_MEM_TYPE;
    if (api.mem_query(memory->handle_, &attributes) != UCS_OK || attributes.mem_type == UCS_MEMORY_TYPE_HOST)
      return fail(Code::kIo, "%s: the CUDA driver sees this pointer as host memory; register it as DRAM", what);
  }
  void* packed = nullptr;
  std::size_t size = 0;
  if (const ucs_status_t status = api.rkey_pack(context.handle(), memory->handle_, &packed, &size); status != UCS_OK)
    return fail(ucx_error(api, std::string(what) + ": pack its key", status));
  memory->key_.assign(static_cast<const char*>(packed), size);
  api.rkey_buffer_release(packed);
  return memory;
}

Memory::~Memory() {
  if (handle_) context_->api().mem_unmap(context_->handle(), handle_);
}

}  // namespace nixl::core::ucx
