#include "backends/libfabric/library.h"

#include <dlfcn.h>
#include <signal.h>

#include <array>
#include <cstdlib>

#include "base/env.h"

namespace nixl::core::libfabric {
namespace {

constexpr const char* kSoname = "libfabric.so.1";

// Libraries that libfabric brings along (psm2) take over signals as they are loaded, SIGINT and SIGTERM among them: the
// program's own handlers are put back.
class KeptSignals {
 public:
  KeptSignals() {
    for (std::size_t i = 0; i < kSignals.size(); ++i) ::sigaction(kSignals[i], nullptr, &before_[i]);
  }
  ~KeptSignals() {
    for (std::size_t i = 0; i < kSignals.size(); ++i) ::sigaction(kSignals[i], &before_[i], nullptr);
  }
  KeptSignals(const KeptSignals&) = delete;
  KeptSignals& operator=(const KeptSignals&) = delete;

 private:
  static constexpr std::array kSignals = {SIGHUP, SIGINT,  SIGQUIT, SIGILL,  SIGABRT, SIGBUS,
                                          SIGFPE, SIGSEGV, SIGPIPE, SIGTERM, SIGCHLD};
  std::array<struct sigaction, kSignals.size()> before_{};
};

template <typename F>
bool find(void* handle, const char* name, F& out, const char*& missing) {
  out = reinterpret_cast<F>(dlsym(handle, name));
  if (!out) missing = name;
  return out != nullptr;
}

Result<Api> load() {
  const auto chosen = env_text("NIXL_LIBFABRIC_LIBRARY");
  const std::string file = chosen.value_or(kSoname);
  void* const handle = [&] {
    const KeptSignals kept;
    return dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);  // kept open: it does not survive being unloaded
  }();
  if (!handle)
    return fail(Code::kUnsupported,
                "no usable %s (looked for %s): %s. Install libfabric 1.17 or above (Debian: libfabric1) or set "
                "NIXL_LIBFABRIC_LIBRARY",
                kSoname, chosen ? "what NIXL_LIBFABRIC_LIBRARY names" : "the system's", dlerror());
  Api api;
  const char* missing = nullptr;
  if (!find(handle, "fi_getinfo", api.getinfo, missing) || !find(handle, "fi_freeinfo", api.freeinfo, missing) ||
      !find(handle, "fi_dupinfo", api.dupinfo, missing) || !find(handle, "fi_fabric", api.fabric, missing) ||
      !find(handle, "fi_getparams", api.getparams, missing) ||
      !find(handle, "fi_freeparams", api.freeparams, missing) || !find(handle, "fi_version", api.version, missing) ||
      !find(handle, "fi_strerror", api.strerror, missing))
    return fail(Code::kUnsupported, "%s has no %s: %s 1.17 or above is needed", file.c_str(), missing, kSoname);
  const std::uint32_t version = api.version();
  api.version_text = std::to_string(FI_MAJOR(version)) + "." + std::to_string(FI_MINOR(version));
  Dl_info info{};
  api.path = dladdr(reinterpret_cast<void*>(api.getinfo), &info) && info.dli_fname ? info.dli_fname : file;
  if (FI_VERSION_LT(version, kApiVersion))
    return fail(Code::kUnsupported, "%s (%s) is version %s: 1.17 or above is needed", kSoname, api.path.c_str(),
                api.version_text.c_str());
  return api;
}

}  // namespace

Result<const Api*> open_api() {
  static const Result<Api> api = load();
  if (!api) return fail(api.error());
  return &*api;
}

Error fabric_error(const Api& api, std::string_view what, long error, Code code) {
  const int number = static_cast<int>(std::labs(error));
  return Error{code, std::string(what) + ": " + api.strerror(number) + " (libfabric " + std::to_string(number) + ")"};
}

bool breaks_the_way(long error) noexcept {
  switch (std::labs(error)) {
    case FI_EINVAL:
    case FI_EACCES:
    case FI_EPERM:
    case FI_EFAULT:
    case FI_EMSGSIZE:
    case FI_ENOSYS:
    case FI_EOPNOTSUPP:
    case FI_ENOKEY:
    case FI_EKEYREJECTED:
    case FI_ETRUNC:
    case FI_ETOOSMALL:
    case FI_EOVERRUN:
    case FI_ENOMEM:
      return false;
    default:
      return true;
  }
}

}  // namespace nixl::core::libfabric
