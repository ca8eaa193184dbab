#include "nixl/version.h"

namespace nixl {

const char* version() noexcept {
  return NIXL_VERSION_TEXT;
}

}  // namespace nixl
