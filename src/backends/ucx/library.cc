#include "backends/ucx/library.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <list>
#include <mutex>
#include <vector>

#include "base/env.h"

#ifndef NIXL_UCX_BUILD_LIBRARY
#define NIXL_UCX_BUILD_LIBRARY ""  // where the build found the package: what a build tree uses
#endif

namespace nixl::core::ucx {
namespace {

namespace fs = std::filesystem;
constexpr const char* kSoname = "libucp.so.0";

bool any_entry(const char* folder, std::string_view prefix) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder, ignored))
    if (entry.path().filename().string().starts_with(prefix)) return true;
  return false;
}

// site-packages/libucx/lib/libucp.so.0, looked for upwards from the file this code lies in.
std::string package_library() {
  Dl_info here{};
  std::error_code ignored;
  if (dladdr(reinterpret_cast<void*>(&any_entry), &here) != 0 && here.dli_fname) {
    for (fs::path folder = fs::absolute(here.dli_fname, ignored).parent_path(); folder.has_relative_path();
         folder = folder.parent_path()) {
      const fs::path candidate = folder / "libucx" / "lib" / kSoname;
      if (fs::exists(candidate, ignored)) return candidate.string();
    }
  }
  const std::string built = NIXL_UCX_BUILD_LIBRARY;
  return !built.empty() && fs::exists(built, ignored) ? built : std::string();
}

struct Candidate {
  std::string path, remark;
};

std::vector<Candidate> candidates() {
  if (auto chosen = env_text("NIXL_UCX_LIBRARY")) return {{*chosen, "chosen by NIXL_UCX_LIBRARY"}};
  std::vector<Candidate> list;
  const std::string package = package_library();
  const std::string system = env_text("NIXL_UCX_EXPECTED_SONAME").value_or(kSoname);
  if (have_rdma_device()) {
    list.push_back({system, "the system's, because an RDMA device is present"});
    if (!package.empty())
      list.push_back({package,
                      "the libucx package; it has no RDMA transports although an RDMA device is present: install "
                      "a system UCX (Debian: libucx0) or set NIXL_UCX_LIBRARY"});
  } else {
    if (!package.empty()) list.push_back({package, "the libucx package"});
    list.push_back({system, "the system's"});
  }
  return list;
}

// UCX patches some twenty functions of memory in the running process and waits 50 ms at each, so that threads leave the
// first instructions of the function, while others that call it spin: 0.4 s when it is loaded and 0.75 s more with CUDA.
// A thread is there for nanoseconds: 1 ms does. UCX reads that from the environment when it is loaded, and only there.
// So it is given another list of variables meanwhile, which is never freed: unlike setenv(), this takes nothing away from a
// thread that is looking something up.
class QuickPatching {
 public:
  QuickPatching() {
    if (env_text("UCX_MEM_BISTRO_GRACE_DURATION")) return;  // the operator's
    static auto& lists = *new std::list<std::vector<char*>>;
    auto* const list = &lists.emplace_back();
    before_ = environ;
    for (char** entry = before_; entry && *entry; ++entry) list->push_back(*entry);
    static char pause[] = "UCX_MEM_BISTRO_GRACE_DURATION=1ms";
    list->push_back(pause);
    list->push_back(nullptr);
    ours_ = environ = list->data();
  }
  ~QuickPatching() {
    if (ours_ && environ == ours_)
      environ = before_;
    else if (ours_)  // another thread has set a variable, in a copy of the list
      ::unsetenv("UCX_MEM_BISTRO_GRACE_DURATION");
  }
  QuickPatching(const QuickPatching&) = delete;
  QuickPatching& operator=(const QuickPatching&) = delete;

 private:
  char **before_ = nullptr, **ours_ = nullptr;
};

Result<Api> load(const Candidate& candidate) {
  int flags = RTLD_NOW | RTLD_LOCAL;
  NIXL_ASSIGN(const auto deep, env_bool("NIXL_UCX_DEEPBIND"));
  if (deep.value_or(false)) flags |= RTLD_DEEPBIND;
  void* const handle = [&] {
    const QuickPatching patching;
    return dlopen(candidate.path.c_str(), flags);
  }();
  if (!handle) return fail(Code::kUnsupported, "%s: %s", candidate.path.c_str(), dlerror());
  Api api;
  const char* missing = nullptr;
#define NIXL_UCP_LOAD(name)                                                     \
  api.name = reinterpret_cast<decltype(api.name)>(dlsym(handle, "ucp_" #name)); \
  if (!api.name) missing = "ucp_" #name;
  NIXL_UCP_FUNCTIONS(NIXL_UCP_LOAD)
#undef NIXL_UCP_LOAD
  api.status_string = reinterpret_cast<decltype(api.status_string)>(dlsym(handle, "ucs_status_string"));
  if (!api.status_string) missing = "ucs_status_string";
  if (missing)  // the handle stays open: UCX does not survive being unloaded
    return fail(Code::kUnsupported, "%s has no %s: UCX 1.13 or above is needed", candidate.path.c_str(), missing);
  // UCX prints errors of endpoints to standard output; we report the same with the peer's name. Only the operator's own
  // UCX_LOG_LEVEL changes that.
  using SetOption = ucs_status_t (*)(const char*, const char*);
  if (const auto set = reinterpret_cast<SetOption>(dlsym(handle, "ucs_global_opts_set_value"));
      set && !env_text("UCX_LOG_LEVEL"))
    (void)set("LOG_LEVEL", "fatal");
  Dl_info info{};
  api.path =
      dladdr(reinterpret_cast<void*>(api.init_version), &info) && info.dli_fname ? info.dli_fname : candidate.path;
  api.remark = std::string("UCX ") + api.get_version_string() + ", " + candidate.remark;
  return api;
}

Result<Api> load_first() {
  std::string tried;
  for (const Candidate& candidate : candidates()) {
    Result<Api> api = load(candidate);
    if (api) return api;
    tried += (tried.empty() ? "" : "; ") + api.error().reason;
  }
  return fail(Code::kUnsupported,
              "no usable %s (looked in: NIXL_UCX_LIBRARY, the libucx package beside ours, the system): %s. Install the "
              "package libucx-cu13 or set NIXL_UCX_LIBRARY",
              kSoname, tried.c_str());
}

}  // namespace

bool have_rdma_device() {
  return any_entry("/sys/class/infiniband", "");
}

bool have_cuda_device() {
  static const bool have = [] {
    if (!any_entry("/dev", "nvidiactl") && !any_entry("/dev", "dxg")) return false;
    void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    return driver != nullptr;  // kept open: UCX opens it anyway
  }();
  return have;
}

Result<const Api*> open_api() {
  static const Result<Api> api = load_first();
  if (!api) return fail(api.error());
  return &*api;
}

Error ucx_error(const Api& api, std::string_view what, ucs_status_t status, Code code) {
  return Error{code,
               std::string(what) + ": " + api.status_string(status) + " (UCX " + std::to_string(int(status)) + ")"};
}

Error operation_error(const Api& api, std::string_view what, ucs_status_t status) {
  switch (status) {
    case UCS_ERR_CONNECTION_RESET:
    case UCS_ERR_ENDPOINT_TIMEOUT:
    case UCS_ERR_NOT_CONNECTED:
    case UCS_ERR_UNREACHABLE:
    case UCS_ERR_REJECTED:
    case UCS_ERR_CANCELED:
    case UCS_ERR_TIMED_OUT:
      return ucx_error(api, what, status, Code::kPeerLost);
    default:
      return ucx_error(api, what, status);
  }
}

}  // namespace nixl::core::ucx
