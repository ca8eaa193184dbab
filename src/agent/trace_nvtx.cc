// NVTX ranges in the domain "nixl". The headers load what NVTX_INJECTION64_PATH names at the first call; without it, every
// call ends at a null pointer. No CUDA is needed.
#include <nvtx3/nvToolsExt.h>

#include "agent/trace.h"

namespace nixl::core {
namespace {

class Nvtx final : public Tracer {
 public:
  Nvtx() noexcept : domain_(nvtxDomainCreateA("nixl")) {}

  std::uint64_t start(const char* what, std::uint64_t bytes) noexcept override {
    const nvtxEventAttributes_t event = with_bytes(what, bytes);
    return nvtxDomainRangeStartEx(domain_, &event);
  }
  void end(std::uint64_t range) noexcept override { nvtxDomainRangeEnd(domain_, range); }
  void push(const char* what) noexcept override {
    const nvtxEventAttributes_t event = named(what);
    nvtxDomainRangePushEx(domain_, &event);
  }
  void pop() noexcept override { nvtxDomainRangePop(domain_); }
  void mark(const char* what, std::uint64_t bytes) noexcept override {
    const nvtxEventAttributes_t event = with_bytes(what, bytes);
    nvtxDomainMarkEx(domain_, &event);
  }

 private:
  static nvtxEventAttributes_t named(const char* what) noexcept {
    nvtxEventAttributes_t event{};
    event.version = NVTX_VERSION;
    event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
    event.messageType = NVTX_MESSAGE_TYPE_ASCII;
    event.message.ascii = what;
    return event;
  }
  static nvtxEventAttributes_t with_bytes(const char* what, std::uint64_t bytes) noexcept {
    nvtxEventAttributes_t event = named(what);
    event.payloadType = NVTX_PAYLOAD_TYPE_UNSIGNED_INT64;
    event.payload.ullValue = bytes;
    return event;
  }

  const nvtxDomainHandle_t domain_;
};

}  // namespace

Tracer* nvtx_tracer() noexcept {
  static Nvtx tracer;
  return &tracer;
}

}  // namespace nixl::core
