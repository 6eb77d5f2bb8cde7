// The wireguard provider: which public key an address belongs to says WireGuard, which node a public key is says a file.
//
// WireGuard tells nobody of changes, so its table is read again and again; who_is() answers from the last one, which is `poll` old at most.
#include "auth/identity/identity.h"
#include "auth/identity/wireguard.h"
#include "base/file.h"
#include "base/file_watch.h"
#include "base/log.h"

#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>

#include <ifaddrs.h>
#include <net/if.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <algorithm>
#include <map>
#include <utility>

namespace postern::auth::identity {
namespace {

/// Those of the interface itself, without link-local ones: peers cannot be told by them.
std::vector<Address> addresses_of(const std::string& interface) {
  std::vector<Address> found;
  ifaddrs* all = nullptr;
  if (::getifaddrs(&all) != 0) return found;
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> owner{all, &::freeifaddrs};
  for (const ifaddrs* i = all; i != nullptr; i = i->ifa_next) {
    if (i->ifa_addr == nullptr || interface != i->ifa_name) continue;
    sockaddr_storage s{};
    if (i->ifa_addr->sa_family == AF_INET) std::memcpy(&s, i->ifa_addr, sizeof(sockaddr_in));
    else if (i->ifa_addr->sa_family == AF_INET6) std::memcpy(&s, i->ifa_addr, sizeof(sockaddr_in6));
    else continue;
    const auto address = Address::from(s);
    if (!address || (!address->v4() && address->bytes()[0] == 0xfe && (address->bytes()[1] & 0xc0) == 0x80)) continue;
    found.push_back(*address);
  }
  std::sort(found.begin(), found.end());
  return found;
}

class Wireguard final : public Provider {
 public:
  Wireguard(boost::asio::io_context& io, WireguardSettings settings) : io_{io}, settings_{std::move(settings)}, again_{io} {}
  ~Wireguard() override { *alive_ = false; }

  Expected<Done, std::vector<Problem>> read_file() {
    auto text = read_whole_file(settings_.file, max_nodes_file_bytes);
    if (!text) return Unexpected{std::vector{Problem{Place{settings_.file, 1, 1}, "", text.error().doing, ""}}};
    auto read = read_toml_nodes(*text, settings_.file, NodesForm::keys);
    if (!read) return Unexpected{std::move(read.error())};
    self_ = std::move(read->self->node);
    names_.clear();
    for (auto& n : read->nodes) names_.emplace(n.public_key, std::move(n));
    return Done{};
  }

  void start(std::function<void(Expected<Done>)> ready, std::function<void()> changed) override {
    ready_ = std::move(ready);
    changed_ = std::move(changed);
    file_ = std::make_unique<FileWatch>(io_, settings_.file, [this] {
      if (const auto read = reload(); !read)
        for (const auto& p : read.error()) spdlog::error("event=wireguard_file_kept problem={}", safe_quoted(p.text(), 1000));
    });
    look();
  }

  void who_is(const Endpoint& peer, Answer answer) override {
    if (!table_) return answer(Unexpected{Error{EAGAIN, why_unknown_}});
    if (std::find(own_.begin(), own_.end(), peer.address) != own_.end())
      return answer(Unexpected{Error{EACCES, "its own address", "This machine cannot log in to itself by its address in the network."}});
    const auto match = table_->find(peer.address);
    if (!match) return answer(std::optional<Node>{});
    const auto name = names_.find(match->key);
    if (name == names_.end()) return answer(std::optional<Node>{});
    const bool host = match->prefix.length == (match->prefix.address.v4() ? 32U : 128U);
    const auto& networks = name->second.networks;
    if (!host && std::find(networks.begin(), networks.end(), match->prefix) == networks.end()) return answer(std::optional<Node>{});
    Node node = name->second.node;
    node.addresses = {peer.address};
    answer(std::optional{std::move(node)});
  }

  const Network& network() const override { return network_; }
  std::vector<Address> own_addresses() const override { return own_; }

  Expected<Done, std::vector<Problem>> reload() override {
    if (auto read = read_file(); !read) return read;
    build();
    spdlog::info("event=wireguard_file_loaded file={} peers={}", safe_quoted(settings_.file), names_.size());
    if (changed_ && !ready_) changed_();
    return Done{};
  }

 private:
  void look() {
    const std::string socket = settings_.uapi_dir + "/" + settings_.interface + ".sock";
    struct stat st {};
    if (::stat(socket.c_str(), &st) == 0 && S_ISSOCK(st.st_mode)) {
      question_ = std::make_unique<UapiQuestion>(io_, socket, settings_.timeout, [this](Expected<PeerTable> answer) { looked(std::move(answer)); });
    } else {
      // The kernel answers at once.
      boost::asio::post(io_, [this, alive = alive_] {
        if (*alive) looked(ask_kernel(settings_.interface, settings_.timeout));
      });
    }
  }

  void looked(Expected<PeerTable> answer) {
    again_.expires_after(settings_.poll);
    again_.async_wait([this, alive = alive_](boost::system::error_code ec) {
      if (!ec && *alive) look();
    });
    if (!answer) return lost(answer.error().doing);
    auto own = addresses_of(settings_.interface);
    // One that is just coming up, or could not be asked: who is in stays.
    if (own.empty()) return lost("the interface has no address");
    if (!table_) spdlog::info("event=wireguard_here interface={}", safe_quoted(settings_.interface));
    const bool same = table_ && *table_ == *answer && own == own_;
    table_ = std::move(*answer);
    own_ = std::move(own);
    if (!same) build();
    if (!be_ready() && !same) changed_();
  }

  void lost(const std::string& why) {
    if (table_ || why_unknown_ != why) spdlog::error("event=wireguard_away interface={} why={}", safe_quoted(settings_.interface), safe_quoted(why, 400));
    why_unknown_ = why;
    table_.reset();
    be_ready();
  }

  bool be_ready() {
    if (!ready_) return false;
    std::exchange(ready_, nullptr)(Done{});
    return true;
  }

  /// The network as policies see it: this machine, and the peers that have a name and are there.
  void build() {
    if (!table_) return;
    std::vector<Node> nodes{self_};
    nodes.front().addresses = own_;
    auto hosts = table_->hosts();
    for (const auto& [key, named] : names_) {
      if (!table_->has(key)) continue;
      nodes.push_back(named.node);
      nodes.back().addresses = std::move(hosts[key]);
    }
    network_ = Network{std::move(nodes)};
  }

  boost::asio::io_context& io_;
  const WireguardSettings settings_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  boost::asio::steady_timer again_;
  std::unique_ptr<UapiQuestion> question_;
  std::unique_ptr<FileWatch> file_;
  std::function<void(Expected<Done>)> ready_;
  std::function<void()> changed_;

  Node self_;
  std::map<PublicKey, TomlNode> names_;
  std::optional<PeerTable> table_;  ///< nothing: WireGuard cannot be asked now
  std::string why_unknown_ = "WireGuard has not answered yet";
  std::vector<Address> own_;
  Network network_;
};

}  // namespace

Expected<std::unique_ptr<Provider>, std::vector<Problem>> make_wireguard_provider(boost::asio::io_context& io, WireguardSettings settings) {
  auto provider = std::make_unique<Wireguard>(io, std::move(settings));
  if (auto read = provider->read_file(); !read) return Unexpected{std::move(read.error())};
  return std::unique_ptr<Provider>{std::move(provider)};
}

}  // namespace postern::auth::identity
