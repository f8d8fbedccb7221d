#include "runtime/visible_cores.h"

#include <algorithm>
#include <charconv>
#include <numeric>
#include <stdexcept>

#include "common/message.h"

namespace neuron::runtime {
namespace {

std::string what_exists(int32_t device_cores) {
  return message("this machine has ", device_cores, device_cores == 1 ? " core" : " cores", " (0-",
                 device_cores - 1, ")");
}

[[noreturn]] void reject(const std::string& text, const std::string& why, int32_t device_cores) {
  throw std::runtime_error(message("NEURON_RT_VISIBLE_CORES='", text, "' ", why, ": ",
                                   what_exists(device_cores),
                                   "; write cores as '3', '0-3' or '0,2', or unset it for all"));
}

std::string trim(const std::string& text) {
  const auto first = text.find_first_not_of(" \t");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

/// NEURON_RT_NUM_CORES: a contiguous run of free cores, else any free ones.
std::vector<int32_t> reserve_free(int32_t count, int32_t device_cores, CoreLock& lock) {
  if (count > device_cores) {
    throw std::runtime_error(message("NEURON_RT_NUM_CORES=", count,
                                     " asks for more than there are: ", what_exists(device_cores),
                                     "; ask for fewer, or unset it"));
  }
  const CoreLock::Turn turn = lock.turn();
  for (int32_t start = 0; start + count <= device_cores; ++start) {
    std::vector<int32_t> window(count);
    std::iota(window.begin(), window.end(), start);
    if (!lock.take(window)) return window;
  }
  std::vector<int32_t> taken;
  std::vector<std::string> holders;
  for (int32_t core = 0; core < device_cores && static_cast<int32_t>(taken.size()) < count;
       ++core) {
    if (const auto holder = lock.take({core})) {
      holders.push_back(holder->describe());
    } else {
      taken.push_back(core);
    }
  }
  if (static_cast<int32_t>(taken.size()) < count) {
    throw std::runtime_error(message("NEURON_RT_NUM_CORES=", count, ": only ", taken.size(), " of ",
                                     device_cores, " cores are free: ", join(holders, "; "),
                                     "; stop one of these, or ask for fewer cores"));
  }
  return taken;
}

}  // namespace

std::vector<int32_t> parse_core_list(const std::string& text, int32_t device_cores) {
  std::vector<int32_t> cores;
  if (trim(text).empty()) reject(text, "names no core", device_cores);
  const auto number = [&](const std::string& untrimmed) {
    const std::string part = trim(untrimmed);
    int32_t value = -1;
    const char* end = part.data() + part.size();
    const auto [stopped, error] = std::from_chars(part.data(), end, value);
    if (error == std::errc::result_out_of_range) {
      reject(text, "names a core that does not exist", device_cores);
    }
    if (part.empty() || error != std::errc() || stopped != end || value < 0) {
      reject(text, "is not understood", device_cores);
    }
    if (value >= device_cores) {
      reject(text, message("names core ", value, ", which does not exist"), device_cores);
    }
    return value;
  };
  for (const std::string& part : split(text, ',')) {
    const auto ends = split(part, '-');
    if (ends.size() > 2) reject(text, "is not understood", device_cores);
    const int32_t first = number(ends.front());
    const int32_t last = number(ends.back());
    if (last < first) reject(text, "has a range that runs backwards", device_cores);
    for (int32_t core = first; core <= last; ++core) {
      if (std::find(cores.begin(), cores.end(), core) != cores.end()) {
        reject(text, message("names core ", core, " twice"), device_cores);
      }
      cores.push_back(core);
    }
  }
  return cores;
}

VisibleCores find_visible_cores(const Settings& settings, int32_t device_cores,
                                const std::string& device_name) {
  std::vector<int32_t> cores;
  CoreLock lock(device_name);
  if (settings.visible_cores) {
    cores = parse_core_list(*settings.visible_cores, device_cores);
  } else if (settings.num_cores) {
    cores = reserve_free(*settings.num_cores, device_cores, lock);
  } else {
    cores.resize(device_cores);
    std::iota(cores.begin(), cores.end(), 0);
  }
  if (settings.visible_cores || (settings.exclusive && !settings.num_cores)) {
    const CoreLock::Turn turn = lock.turn();
    if (const auto holder = lock.take(cores)) {
      throw std::runtime_error(message(
          holder->describe(), "; ",
          settings.visible_cores ? message("this process asks for it by NEURON_RT_VISIBLE_CORES='",
                                           *settings.visible_cores, "'")
                                 : std::string("this process asks for all by NEURON_EXT_EXCLUSIVE"),
          ": stop that process, or choose other cores"));
    }
  }
  return {std::move(cores), std::move(lock)};
}

}  // namespace neuron::runtime
