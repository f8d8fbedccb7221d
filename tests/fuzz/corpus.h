#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace neuron::fuzz {

struct File {
  std::string name;
  std::string data;
};

/// The file `path`, or the files "*.pt" of that folder in the order of their names.
/// @throws std::runtime_error if there is none, or one cannot be read.
std::vector<File> read_files(const std::filesystem::path& path);

/// The words that an error begins with, as a file may be called: without numbers and what is
/// quoted.
std::string kind_of(const std::string& error);

/// Keeps the shortest input of each kind of error.
class Keeper {
 public:
  void offer(const std::string& kind, const std::string& archive);

  /// Writes each to `folder`, as "<kind>.pt".
  /// @throws std::runtime_error if that cannot be written.
  void write(const std::filesystem::path& folder) const;

 private:
  std::map<std::string, std::string> kept_;
};

}  // namespace neuron::fuzz
