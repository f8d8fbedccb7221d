#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include "common/log.h"

namespace neuron::runtime {

enum class RuntimeKind { kAuto, kHost, kNrt };

/// What the environment asks of the runtime. Names with NEURON_RT_ are those of the public Neuron
/// runtime configuration guide.
struct Settings {
  RuntimeKind runtime = RuntimeKind::kAuto;  ///< NEURON_EXT_RUNTIME
  std::optional<int32_t> host_cores;         ///< NEURON_EXT_HOST_CORES
  std::optional<std::string> visible_cores;  ///< NEURON_RT_VISIBLE_CORES, unparsed
  std::optional<int32_t> num_cores;          ///< NEURON_RT_NUM_CORES; unset and 0 mean all
  bool exclusive = false;                    ///< NEURON_EXT_EXCLUSIVE
  /// NEURON_RT_EXEC_TIMEOUT. Zero is no limit, also when unset: CPUs are slower than what the
  /// guide's 30 s are meant for.
  std::chrono::seconds exec_timeout{0};
  LogLevel log_level = LogLevel::kError;             ///< NEURON_RT_LOG_LEVEL
  LogLocation log_location = LogLocation::kConsole;  ///< NEURON_RT_LOG_LOCATION

  /// @throws std::runtime_error naming the variable, what was read and what is expected.
  static Settings from_environment();
};

enum class NativeCode { kAllow, kSigned, kDeny };

/// NEURON_EXT_NATIVE_CODE, read at each load: whose native code may run. kAllow if unset.
/// @throws std::runtime_error on junk.
NativeCode native_code_policy();

/// NEURON_EXT_TRUSTED_KEYS, read at each load if the policy is kSigned: a file of public keys.
/// @throws std::runtime_error if unset.
std::string trusted_keys_file();

/// NEURON_RT_VALIDATE_HASH, read at each load.
/// @throws std::runtime_error on junk.
bool validate_hash();

}  // namespace neuron::runtime
