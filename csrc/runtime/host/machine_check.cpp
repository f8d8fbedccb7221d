#include "runtime/host/machine_check.h"

#include <sys/utsname.h>
#include <torch/version.h>

#include <algorithm>
#include <stdexcept>

#include "common/log.h"
#include "common/message.h"
#include "runtime/host/cpu_topology.h"
#include "runtime/settings.h"

namespace neuron::runtime::host {
namespace {

/// A setting that does not work is no fault of the caller.
std::vector<std::string> read_trusted_keys(const std::string& file) {
  try {
    return read_public_keys(file);
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(message("NEURON_EXT_TRUSTED_KEYS: ", error.what()));
  }
}

std::string machine_arch() {
  utsname names{};
  return ::uname(&names) == 0 ? names.machine : "unknown";
}

/// "2.13" of "2.13.0": native code fits the versions that share it.
std::string minor_version(const std::string& version) {
  const auto first = version.find('.');
  return first == std::string::npos ? version : version.substr(0, version.find('.', first + 1));
}

/// Why this machine cannot run the native code, or nothing.
std::string obstacle(const Requirements& needs) {
  const std::string arch = machine_arch();
  if (needs.arch != arch) {
    return message("it was compiled for ", needs.arch, " and this machine is ", arch);
  }
  const std::string torch_here = message(TORCH_VERSION_MAJOR, ".", TORCH_VERSION_MINOR);
  if (minor_version(needs.torch_version) != torch_here) {
    return message("it was compiled by torch ", needs.torch_version, " and this is torch ",
                   TORCH_VERSION);
  }
  const auto& here = cpu_features();
  std::vector<std::string> missing;
  for (const auto& feature : needs.cpu_features) {
    if (!std::binary_search(here.begin(), here.end(), feature)) missing.push_back(feature);
  }
  if (missing.empty()) return "";
  return message("it was compiled for CPU features that this machine lacks (", join(missing),
                 "); it needs ", join(needs.cpu_features));
}

/// Why the native code may not run, or nothing.
std::string prohibition(const Executable& executable) {
  switch (native_code_policy()) {
    case NativeCode::kAllow:
      return "";
    case NativeCode::kSigned: {
      const std::string file = trusted_keys_file();
      const std::string reason = distrust(executable, read_trusted_keys(file));
      if (reason.empty()) return "";
      return message("NEURON_EXT_NATIVE_CODE=signed with NEURON_EXT_TRUSTED_KEYS='", file,
                     "' forbids it, since ", reason);
    }
    case NativeCode::kDeny:
      break;
  }
  return "NEURON_EXT_NATIVE_CODE=deny forbids native code";
}

}  // namespace

Format choose_format(const Executable& executable) {
  if (executable.format != Format::kInductor) return executable.format;
  std::string reason = prohibition(executable);
  if (reason.empty()) reason = obstacle(executable.requirements);
  if (reason.empty()) return Format::kInductor;
  if (executable.graph != nullptr) {
    log(LogLevel::kWarning, message("subgraph '", executable.name,
                                    "' runs its portable graph, not its native code: ", reason));
    return Format::kTorchScript;
  }
  throw std::runtime_error(
      message("subgraph '", executable.name, "' has native code that cannot run here: ", reason,
              ". It carries no portable graph to fall back on: trace it again on such a machine as "
              "this, or "
              "with compiler=\"torchscript\", or with compiler_args=\"--portable-graph\""));
}

}  // namespace neuron::runtime::host
