#include "base/log.h"

#include <strings.h>
#include <unistd.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

namespace nixl::core {
namespace {

constexpr const char* kNames[] = {"TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL"};
std::atomic<int> g_level{-1};

int level_from_environment() noexcept {
  const char* text = std::getenv("NIXL_LOG_LEVEL");
  if (!text || !*text) return static_cast<int>(LogLevel::kWarn);
  for (int i = 0; i < 6; ++i)
    if (strcasecmp(text, kNames[i]) == 0) return i;
  std::fprintf(stderr, "NIXL_LOG_LEVEL is '%s'; allowed: TRACE DEBUG INFO WARN ERROR FATAL; WARN is used\n", text);
  return static_cast<int>(LogLevel::kWarn);
}

}  // namespace

bool log_enabled(LogLevel level) noexcept {
  int current = g_level.load(std::memory_order_relaxed);
  if (current < 0) {
    current = level_from_environment();
    g_level.store(current, std::memory_order_relaxed);
  }
  return static_cast<int>(level) >= current;
}

void set_log_level(LogLevel level) noexcept {
  g_level.store(static_cast<int>(level), std::memory_order_relaxed);
}

void log_line(LogLevel level, const char* file, int line, const char* format, ...) noexcept {
  char text[2048];
  const time_t now = std::time(nullptr);
  tm parts;
  localtime_r(&now, &parts);
  const char* base = std::strrchr(file, '/');
  size_t used = std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &parts);
  used += std::snprintf(text + used, sizeof text - used, " NIXL %-7s %s:%d ", kNames[static_cast<int>(level)],
                        base ? base + 1 : file, line);
  va_list args;
  va_start(args, format);
  const int body = std::vsnprintf(text + used, sizeof text - used - 1, format, args);
  va_end(args);
  if (body > 0) used += static_cast<size_t>(body);
  if (used > sizeof text - 2) used = sizeof text - 2;
  text[used++] = '\n';
  [[maybe_unused]] const ssize_t written = ::write(STDERR_FILENO, text, used);
}

}  // namespace nixl::core
