#include "corpus.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <stdexcept>

namespace neuron::fuzz {
namespace {

std::string contents(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  if (!in) throw std::runtime_error("cannot read " + path.string());
  return out.str();
}

/// The first words of `text`, joined by "_", without numbers and what is quoted.
std::string words(const std::string& text, size_t most) {
  constexpr size_t kMostLetters = 50;
  std::string joined;
  bool quoted = false;
  for (const char letter : text) {
    if (letter == '\'' || letter == '"') quoted = !quoted;
    const char small = letter >= 'A' && letter <= 'Z' ? static_cast<char>(letter + 32) : letter;
    if (!quoted && small >= 'a' && small <= 'z') {
      joined += small;
    } else if (!joined.empty() && joined.back() != '_') {
      if (--most == 0) break;
      joined += '_';
    }
    if (joined.size() == kMostLetters) break;
  }
  while (joined.ends_with('_')) joined.pop_back();
  return joined;
}

}  // namespace

std::vector<File> read_files(const std::filesystem::path& path) {
  if (!std::filesystem::is_directory(path)) return {{path.filename().string(), contents(path)}};
  std::vector<File> files;
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    if (entry.path().extension() != ".pt") continue;
    files.push_back({entry.path().filename().string(), contents(entry.path())});
  }
  if (files.empty()) throw std::runtime_error("no file *.pt in " + path.string());
  std::sort(files.begin(), files.end(),
            [](const File& one, const File& other) { return one.name < other.name; });
  return files;
}

std::string kind_of(const std::string& error) {
  constexpr size_t kMostWords = 5;
  static const std::string field = "field '";
  const size_t name = error.find(field);
  if (name == std::string::npos) return words(error, kMostWords);
  const size_t end = std::min(error.find('\'', name + field.size()), error.size() - 1);
  return "field_" +
         words(error.substr(name + field.size(), end - name - field.size()), kMostWords) + "_" +
         words(error.substr(end + 1), kMostWords);
}

void Keeper::offer(const std::string& kind, const std::string& archive) {
  const auto [entry, is_new] = kept_.try_emplace(kind, archive);
  if (!is_new && archive.size() < entry->second.size()) entry->second = archive;
}

void Keeper::write(const std::filesystem::path& folder) const {
  std::filesystem::create_directories(folder);
  for (const auto& [kind, archive] : kept_) {
    const auto path = folder / (kind + ".pt");
    std::ofstream out(path, std::ios::binary);
    out << archive;
    out.close();
    if (!out) throw std::runtime_error("cannot write " + path.string());
  }
}

}  // namespace neuron::fuzz
