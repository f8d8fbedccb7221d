#include "common/log.h"

#include <syslog.h>

#include <atomic>
#include <cstdio>

namespace neuron {
namespace {

std::atomic<LogLevel> wanted{LogLevel::kError};
std::atomic<LogLocation> where{LogLocation::kConsole};

const char* name_of(LogLevel level) {
  switch (level) {
    case LogLevel::kQuiet:
      return "QUIET";
    case LogLevel::kError:
      return "ERROR";
    case LogLevel::kWarning:
      return "WARNING";
    case LogLevel::kInfo:
      return "INFO";
    case LogLevel::kDebug:
      return "DEBUG";
    case LogLevel::kTrace:
      return "TRACE";
  }
  return "?";
}

int syslog_priority(LogLevel level) {
  switch (level) {
    case LogLevel::kQuiet:
    case LogLevel::kError:
      return LOG_ERR;
    case LogLevel::kWarning:
      return LOG_WARNING;
    case LogLevel::kInfo:
      return LOG_INFO;
    case LogLevel::kDebug:
    case LogLevel::kTrace:
      return LOG_DEBUG;
  }
  return LOG_ERR;
}

}  // namespace

void configure_log(LogLevel level, LogLocation location) {
  wanted.store(level, std::memory_order_relaxed);
  where.store(location, std::memory_order_relaxed);
}

void log(LogLevel level, const std::string& text) noexcept {
  if (level == LogLevel::kQuiet || level > wanted.load(std::memory_order_relaxed)) return;
  if (where.load(std::memory_order_relaxed) == LogLocation::kSyslog) {
    syslog(LOG_USER | syslog_priority(level), "neuron_ext: %s", text.c_str());
  } else {
    std::fprintf(stderr, "neuron_ext %s: %s\n", name_of(level), text.c_str());
  }
}

}  // namespace neuron
