// Version of the headers (macros) and of the library that was loaded (function).
#pragma once
#ifndef NIXL_EXPORT
#define NIXL_EXPORT __attribute__((visibility("default")))
#endif
#define NIXL_VERSION_MAJOR 1
#define NIXL_VERSION_MINOR 6
#define NIXL_VERSION_PATCH 0
#define NIXL_VERSION_TEXT "1.6.0"

namespace nixl {
NIXL_EXPORT const char* version() noexcept;
}  // namespace nixl
