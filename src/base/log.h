// One line a message on stderr: "2026-01-31 12:00:00 NIXL WARN    file.cc:12 text". Thread-safe; a line is one write.
// Level from NIXL_LOG_LEVEL (TRACE DEBUG INFO WARN ERROR FATAL, any case; default WARN), read at the first message.
#pragma once

namespace nixl::core {

enum class LogLevel : int { kTrace, kDebug, kInfo, kWarn, kError, kFatal };

bool log_enabled(LogLevel level) noexcept;
void set_log_level(LogLevel level) noexcept;
[[gnu::format(printf, 4, 5)]] void log_line(LogLevel level, const char* file, int line, const char* format,
                                            ...) noexcept;

}  // namespace nixl::core

#define NIXL_LOG(level, ...)                                                                              \
  do {                                                                                                    \
    if (::nixl::core::log_enabled(level)) ::nixl::core::log_line(level, __FILE__, __LINE__, __VA_ARGS__); \
  } while (0)
#define NIXL_DEBUG(...) NIXL_LOG(::nixl::core::LogLevel::kDebug, __VA_ARGS__)
#define NIXL_INFO(...) NIXL_LOG(::nixl::core::LogLevel::kInfo, __VA_ARGS__)
#define NIXL_WARN(...) NIXL_LOG(::nixl::core::LogLevel::kWarn, __VA_ARGS__)
#define NIXL_ERROR(...) NIXL_LOG(::nixl::core::LogLevel::kError, __VA_ARGS__)
