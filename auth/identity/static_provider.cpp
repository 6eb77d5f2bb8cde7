// The static provider: the network is what a TOML file says. For the demo, tests, and networks whose addresses never change.
//
// Never asks anything outside; the file is read at the start and on reload() only.
#include "auth/identity/identity.h"
#include "auth/identity/toml_nodes.h"

#include "base/file.h"

namespace postern::auth::identity {
namespace {

class StaticProvider final : public Provider {
 public:
  explicit StaticProvider(std::string file) : file_{std::move(file)} {}

  void who_is(const Endpoint& peer, Answer answer) override {
    const Node* node = network_.find(peer.address);
    answer(node == nullptr ? std::nullopt : std::optional{*node});
  }

  const Network& network() const override { return network_; }

  Expected<Done, std::vector<Problem>> reload() override {
    auto text = read_whole_file(file_, max_nodes_file_bytes);
    if (!text) return Unexpected{std::vector{Problem{Place{file_, 1, 1}, "", text.error().doing, ""}}};
    auto read = parse_static_nodes(*text, file_);
    if (!read) return Unexpected{std::move(read.error())};
    network_ = std::move(*read);
    return Done{};
  }

 private:
  std::string file_;
  Network network_;
};

}  // namespace

Expected<Network, std::vector<Problem>> parse_static_nodes(std::string_view text, std::string file_name) {
  auto read = read_toml_nodes(text, std::move(file_name), NodesForm::fixed);
  if (!read) return Unexpected{std::move(read.error())};
  std::vector<Node> nodes;
  nodes.reserve(read->nodes.size());
  for (auto& n : read->nodes) nodes.push_back(std::move(n.node));
  return Network{std::move(nodes)};
}

Expected<std::unique_ptr<Provider>, std::vector<Problem>> make_static_provider(std::string file) {
  auto provider = std::make_unique<StaticProvider>(std::move(file));
  if (auto loaded = provider->reload(); !loaded) return Unexpected{std::move(loaded.error())};
  return std::unique_ptr<Provider>{std::move(provider)};
}

}  // namespace postern::auth::identity
