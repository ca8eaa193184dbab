#include "agent/trace.h"

#include <cstdlib>
#include <string_view>

#include "agent/settings.h"
#include "base/log.h"

namespace nixl::core {

Tracer* open_tracer(const Settings& settings, const std::string& agent) {
  constexpr const char* kVariable = "NIXL_TRACE_BACKENDS";
  const std::optional<std::string> named = settings.text(kVariable);
  if (!named) {
    const char* const injection = std::getenv("NVTX_INJECTION64_PATH");
    return injection && *injection ? nvtx_tracer() : nullptr;
  }
  Tracer* chosen = nullptr;
  for (std::string_view rest = *named; !rest.empty();) {
    const std::size_t comma = rest.find(',');
    const std::string name(rest.substr(0, comma));
    rest = comma == rest.npos ? std::string_view() : rest.substr(comma + 1);
    if (name.empty()) continue;
    if (name != "nvtx") {
      NIXL_WARN("agent %s: %s names '%s', which is no trace backend; known: nvtx", agent.c_str(), kVariable,
                name.c_str());
    } else if (chosen = nvtx_tracer(); !chosen) {
      NIXL_WARN(
          "agent %s: %s names 'nvtx', but this library was built without the header nvtx3/nvToolsExt.h (part of "
          "the CUDA toolkit)",
          agent.c_str(), kVariable);
    }
  }
  return chosen;
}

}  // namespace nixl::core
