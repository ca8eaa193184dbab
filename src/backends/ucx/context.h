// One UCX context: the transports and devices in use, and memory registered with them. Thread-safe.
#pragma once
#include <memory>
#include <string>

#include "backends/ucx/library.h"
#include "backends/ucx/options.h"
#include "contract/memory.h"

namespace nixl::core::ucx {

class Context {
 public:
  static Result<std::unique_ptr<Context>> open(const Options& options);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Api& api() const noexcept { return *api_; }
  ucp_context_h handle() const noexcept { return handle_; }
  // The transports asked for, for messages: "UCX_TLS=rc,cuda_copy" or "all transports".
  const std::string& transports_asked() const noexcept { return asked_; }

 private:
  Context() = default;
  const Api* api_ = nullptr;
  ucp_context_h handle_ = nullptr;
  std::string asked_;
};

// A registered range. Registered until destroyed.
class Memory {
 public:
  static Result<std::unique_ptr<Memory>> open(const Context& context, const Region& region);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  ucp_mem_h handle() const noexcept { return handle_; }
  const std::string& remote_key() const noexcept { return key_; }  // what a peer unpacks to reach it

 private:
  Memory() = default;
  const Context* context_ = nullptr;
  ucp_mem_h handle_ = nullptr;
  std::string key_;
};

}  // namespace nixl::core::ucx
