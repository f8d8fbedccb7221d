#include "runtime/settings.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/message.h"

namespace neuron::runtime {
namespace {

std::optional<std::string> read(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr) return std::nullopt;
  return std::string(value);
}

[[noreturn]] void reject(const char* name, const std::string& value, const std::string& expected) {
  throw std::runtime_error(
      message(name, "='", value, "' is not understood: expected ", expected, ", or unset it"));
}

std::string lower(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return text;
}

int32_t parse_int(const char* name, const std::string& value, int32_t least,
                  const std::string& expected) {
  int32_t number = 0;
  const char* end = value.data() + value.size();
  const auto [stopped, error] = std::from_chars(value.data(), end, number);
  if (error != std::errc() || stopped != end || number < least) reject(name, value, expected);
  return number;
}

template <typename T>
T parse_choice(const char* name, const std::string& value,
               const std::vector<std::pair<std::string, T>>& choices) {
  for (const auto& [text, choice] : choices) {
    if (lower(value) == text) return choice;
  }
  std::vector<std::string> names;
  for (const auto& choice : choices) names.push_back(choice.first);
  reject(name, value, "one of " + join(names));
}

bool parse_bool(const char* name, bool unset) {
  const auto value = read(name);
  if (!value) return unset;
  return parse_choice<bool>(name, *value,
                            {{"true", true}, {"false", false}, {"1", true}, {"0", false}});
}

}  // namespace

Settings Settings::from_environment() {
  Settings settings;
  if (const auto value = read("NEURON_EXT_RUNTIME")) {
    settings.runtime = parse_choice<RuntimeKind>(
        "NEURON_EXT_RUNTIME", *value,
        {{"auto", RuntimeKind::kAuto}, {"host", RuntimeKind::kHost}, {"nrt", RuntimeKind::kNrt}});
  }
  if (const auto value = read("NEURON_EXT_HOST_CORES")) {
    constexpr int32_t kMost = 4096;
    const char* expected = "a number of cores from 1 to 4096";
    settings.host_cores = parse_int("NEURON_EXT_HOST_CORES", *value, 1, expected);
    if (*settings.host_cores > kMost) reject("NEURON_EXT_HOST_CORES", *value, expected);
  }
  settings.visible_cores = read("NEURON_RT_VISIBLE_CORES");
  if (const auto value = read("NEURON_RT_NUM_CORES")) {
    const int32_t number =
        parse_int("NEURON_RT_NUM_CORES", *value, 0, "a number of cores, or 0 for all");
    if (number > 0) settings.num_cores = number;
  }
  settings.exclusive = parse_bool("NEURON_EXT_EXCLUSIVE", false);
  if (const auto value = read("NEURON_RT_EXEC_TIMEOUT")) {
    settings.exec_timeout = std::chrono::seconds(
        parse_int("NEURON_RT_EXEC_TIMEOUT", *value, 0, "a number of seconds, or 0 for no limit"));
  }
  if (const auto value = read("NEURON_RT_LOG_LEVEL")) {
    settings.log_level = parse_choice<LogLevel>("NEURON_RT_LOG_LEVEL", *value,
                                                {{"error", LogLevel::kError},
                                                 {"warning", LogLevel::kWarning},
                                                 {"info", LogLevel::kInfo},
                                                 {"debug", LogLevel::kDebug},
                                                 {"trace", LogLevel::kTrace},
                                                 {"quiet", LogLevel::kQuiet}});
  }
  if (const auto value = read("NEURON_RT_LOG_LOCATION")) {
    settings.log_location = parse_choice<LogLocation>(
        "NEURON_RT_LOG_LOCATION", *value,
        {{"console", LogLocation::kConsole}, {"syslog", LogLocation::kSyslog}});
  }
  return settings;
}

NativeCode native_code_policy() {
  const auto value = read("NEURON_EXT_NATIVE_CODE");
  if (!value) return NativeCode::kAllow;
  return parse_choice<NativeCode>("NEURON_EXT_NATIVE_CODE", *value,
                                  {{"allow", NativeCode::kAllow},
                                   {"signed", NativeCode::kSigned},
                                   {"deny", NativeCode::kDeny}});
}

std::string trusted_keys_file() {
  const auto value = read("NEURON_EXT_TRUSTED_KEYS");
  if (value && !value->empty()) return *value;
  throw std::runtime_error(
      "NEURON_EXT_NATIVE_CODE=signed needs NEURON_EXT_TRUSTED_KEYS: set it to a PEM file of the "
      "Ed25519 public keys whose native code may run");
}

bool validate_hash() {
  return parse_bool("NEURON_RT_VALIDATE_HASH", false);
}

}  // namespace neuron::runtime
