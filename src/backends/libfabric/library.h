// The libfabric library, opened at run time. Most of its calls go through tables inside its objects, so that a handful of
// functions is all that has to be found by name.
#pragma once
#include <rdma/fabric.h>
#include <rdma/fi_errno.h>

#include <string>

#include "base/result.h"

namespace nixl::core::libfabric {

// The version of the interface that is asked for, and the least that is accepted.
inline constexpr std::uint32_t kApiVersion = FI_VERSION(1, 17);

struct Api {
  decltype(&::fi_getinfo) getinfo = nullptr;
  decltype(&::fi_freeinfo) freeinfo = nullptr;
  decltype(&::fi_dupinfo) dupinfo = nullptr;
  decltype(&::fi_fabric) fabric = nullptr;
  decltype(&::fi_getparams) getparams = nullptr;
  decltype(&::fi_freeparams) freeparams = nullptr;
  decltype(&::fi_version) version = nullptr;
  decltype(&::fi_strerror) strerror = nullptr;

  std::string path;          // the file that was opened
  std::string version_text;  // "1.17"
};

// Opens the library at the first call and keeps it for the life of the process: NIXL_LIBFABRIC_LIBRARY, else the system's
// libfabric.so.1. kUnsupported: the reason names what was tried with the loader's words. Thread-safe.
Result<const Api*> open_api();

// "what: <libfabric's text> (libfabric 111)"; `error` may be negative, as calls return it.
Error fabric_error(const Api& api, std::string_view what, long error, Code code = Code::kIo);

// An error that says that the way to the peer broke, rather than that the operation was refused.
bool breaks_the_way(long error) noexcept;

}  // namespace nixl::core::libfabric
