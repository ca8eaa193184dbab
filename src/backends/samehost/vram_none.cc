// Builds without CUDA kernels: GPU memory is left to the backend asked for.
#include "backends/samehost/vram.h"

namespace nixl::core::samehost {

Result<void> Vram::probe() {
  return fail(Code::kUnsupported, "this build has no CUDA kernels (nvcc was not found when it was configured)");
}

Result<std::unique_ptr<Vram>> Vram::open(std::shared_ptr<Mailbox>) {
  NIXL_TRY(probe());
  return fail(Code::kInternal, "unreachable");
}

}  // namespace nixl::core::samehost
