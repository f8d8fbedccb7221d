#pragma once

#include <sstream>
#include <string>
#include <vector>

namespace neuron {

/// The arguments written one after another: for error and log texts.
template <typename... Args>
std::string message(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

/// "a, b, c".
template <typename Range>
std::string join(const Range& items, const char* separator = ", ") {
  std::ostringstream out;
  const char* before = "";
  for (const auto& item : items) {
    out << before << item;
    before = separator;
  }
  return out.str();
}

}  // namespace neuron
