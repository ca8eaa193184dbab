// What libnixl.so exports: everything else in it is hidden.
#pragma once

#if !defined(__linux__)
#error "Linux only"
#endif
#ifndef NIXL_EXPORT
#define NIXL_EXPORT __attribute__((visibility("default")))
#endif
