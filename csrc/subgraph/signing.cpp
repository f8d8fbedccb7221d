#include "subgraph/signing.h"

#include <stdexcept>

#include "common/message.h"
#include "subgraph/state_digest.h"

namespace neuron::subgraph {

using runtime::Content;
using runtime::ContentPtr;
using runtime::Executable;

namespace {

void check_content(const Executable& executable, const char* what, const ContentPtr& content) {
  if (content == nullptr || content->verify(Content::Check::kFull, /*anew=*/true)) return;
  throw std::runtime_error(message("the ", what, " of subgraph '", executable.name,
                                   "' is not what its digest says: it was changed or damaged"));
}

}  // namespace

std::string sign(const std::vector<SubgraphHandle>& subgraphs,
                 const std::string& private_key_file) {
  const std::string key = runtime::read_key_file(private_key_file);
  std::vector<runtime::Signature> signatures;
  try {
    for (const auto& subgraph : subgraphs) {
      signatures.push_back(runtime::sign(signed_digest(subgraph->state()), key));
    }
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(message("'", private_key_file, "' ", error.what()));
  }
  for (size_t i = 0; i < subgraphs.size(); ++i) {
    subgraphs[i]->get()->executable().signature->set(signatures[i]);
  }
  return signatures.empty() ? "" : signatures.front().signer;
}

void verify(const std::vector<SubgraphHandle>& subgraphs, const std::string& public_keys_file) {
  const auto trusted = runtime::read_public_keys(public_keys_file);
  for (const auto& subgraph : subgraphs) {
    const Executable& executable = subgraph->get()->executable();
    const std::string reason = runtime::distrust(executable, trusted);
    if (!reason.empty()) {
      throw std::runtime_error(
          message("subgraph '", executable.name, "' cannot be trusted: ", reason));
    }
    check_content(executable, "native code", executable.code);
    check_content(executable, "weights", executable.weights);
    check_content(executable, "portable graph", executable.graph);
  }
}

}  // namespace neuron::subgraph
