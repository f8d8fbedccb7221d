#pragma once

#include <string>

namespace neuron {

/// Verbosity as the Neuron runtime's configuration guide names it.
enum class LogLevel { kQuiet, kError, kWarning, kInfo, kDebug, kTrace };
enum class LogLocation { kConsole, kSyslog };

/// Sets what `log` writes and where. Thread-safe. Until it is called: errors, to the console.
void configure_log(LogLevel level, LogLocation location);

/// Writes one line if `level` is wanted. Thread-safe; never throws.
void log(LogLevel level, const std::string& text) noexcept;

}  // namespace neuron
