// postern known-hosts: ssh's KnownHostsCommand on a client in the network. The network says whose address it is, and its tunnel leads to
// that node only, so what the node says of its host keys is true.
#include "cli/command.h"

#include "auth/identity/identity.h"
#include "auth/identity/localapi.h"
#include "auth/identity/tailscaled.h"
#include "base/address.h"

#include <CLI/CLI.hpp>

#include <boost/asio/io_context.hpp>

#include <cerrno>

#include <fcntl.h>
#include <netdb.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

extern char** environ;

namespace postern::cli {
namespace {

struct Options {
  std::string host;
  std::string nodes;  ///< a file of the static provider, in place of tailscaled
  std::string socket = auth::identity::TailscaledSettings{}.socket;
  unsigned timeout = 5;
  unsigned port = 0;
};

/// "name", "1.2.3.4", "[name]:2222": as ssh looks it up in known_hosts (ssh_config(5), token %H).
struct Wanted {
  std::string host;
  unsigned port = 22;
};

std::optional<Wanted> read_wanted(const std::string& text) {
  // No pattern, no list, no second field: the text is printed into known_hosts lines.
  const bool plain = std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isalnum(c) || std::strchr(".-_:%[]", c) != nullptr; });
  if (text.empty() || !plain || text.size() > 300) return std::nullopt;
  if (text.front() != '[') return text.find_first_of("[]") == std::string::npos ? std::optional{Wanted{text}} : std::nullopt;
  const auto end = text.find("]:");
  if (end == std::string::npos || end < 2 || text.find_first_of("[]", 1) != end || text.find_first_of("[]", end + 1) != std::string::npos) return std::nullopt;
  const std::string port = text.substr(end + 2);
  if (port.empty() || port.size() > 5 || !std::all_of(port.begin(), port.end(), [](unsigned char c) { return std::isdigit(c); }) || std::stoul(port) > 65535) return std::nullopt;
  return Wanted{text.substr(1, end - 1), static_cast<unsigned>(std::stoul(port))};
}

std::vector<Address> resolve(const std::string& host) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (::getaddrinfo(host.c_str(), nullptr, &hints, &found) != 0) return {};
  const std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)> owner{found, &::freeaddrinfo};
  std::vector<Address> all;
  for (const addrinfo* a = found; a != nullptr; a = a->ai_next) {
    sockaddr_storage s{};
    std::memcpy(&s, a->ai_addr, a->ai_addrlen);
    if (const auto address = Address::from(s); address && std::find(all.begin(), all.end(), *address) == all.end()) all.push_back(*address);
  }
  return all;
}

/// The network's nodes by their whole names (a Provider of tailscaled has the first label only), or why it cannot say. Asks once.
Expected<Network> ask_network(const Options& o) {
  namespace identity = auth::identity;
  if (!o.nodes.empty()) {
    auto made = identity::make_static_provider(o.nodes);
    if (!made) return Unexpected{Error{EINVAL, made.error().front().text()}};
    return (*made)->network();
  }
  boost::asio::io_context io;
  identity::LocalApi tailscaled{io, o.socket, std::chrono::seconds{o.timeout}};
  std::optional<Expected<identity::LocalApi::Answer>> got;
  tailscaled.ask({.target = "/localapi/v0/status", .limit = identity::max_status_bytes, .answer = [&](Expected<identity::LocalApi::Answer> answer) {
    got = std::move(answer);
    io.stop();
  }});
  io.run();
  if (!got) return Unexpected{Error{EAGAIN, "tailscaled did not answer"}};
  if (!*got) return Unexpected{got->error()};
  if ((*got)->status != 200) return Unexpected{Error{EAGAIN, "tailscaled: status " + std::to_string((*got)->status)}};
  auto status = identity::read_status((*got)->body, false);
  if (!status) return Unexpected{status.error()};
  if (!status->running()) return Unexpected{Error{EAGAIN, "tailscaled is not connected to its network"}};
  // Then no tunnel leads to the network's addresses from here, but whatever road there is: anybody may answer.
  if (!status->tun) return Unexpected{Error{ENOTSUP, "tailscaled runs without a TUN device"}};
  for (auto& node : status->network.nodes) {
    // Where the network has no name for it, it would be called what it calls itself (HostName).
    const auto name = status->dns_names.find(node.id);
    node.name = name != status->dns_names.end() ? name->second : "";
  }
  return std::move(status->network);
}

/// By its whole name, or by its first label alone. With another domain behind that it is somebody else's name: a node may well be called "github".
bool is_called(const Node& node, std::string host) {
  if (host.size() > 1 && host.back() == '.' && host.find('.') != host.size() - 1) host.pop_back();  // the same name, as the DNS writes it
  const auto same = [&host](std::string_view name) {
    const auto lower = [](char c) { return std::tolower(static_cast<unsigned char>(c)); };
    return !name.empty() && std::equal(name.begin(), name.end(), host.begin(), host.end(), [&](char a, char b) { return lower(a) == lower(b); });
  };
  const std::string_view name{node.name};
  return same(name) || same(name.substr(0, name.find('.')));
}

/// What ssh-keyscan(1) prints of one kind of key: "type base64" each line.
std::vector<std::string> scan(const Address& address, unsigned port, const std::string& types, unsigned timeout) {
  int out[2];
  if (::pipe(out) != 0) return {};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, out[1], 1);
  posix_spawn_file_actions_addclose(&actions, out[0]);
  posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", O_WRONLY, 0);  // its comments
  std::vector<std::string> words = {"ssh-keyscan", "-T", std::to_string(timeout), "-p", std::to_string(port), "-t", types, "--", address.text()};
  std::vector<char*> argv;
  for (auto& w : words) argv.push_back(w.data());
  argv.push_back(nullptr);
  pid_t pid = -1;
  const int failed = ::posix_spawnp(&pid, "ssh-keyscan", &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  ::close(out[1]);
  std::string text;
  char buffer[4096];
  for (ssize_t n; failed == 0 && (n = ::read(out[0], buffer, sizeof buffer)) != 0;) {
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 || text.size() > 256 * 1024) break;
    text.append(buffer, static_cast<std::size_t>(n));
  }
  ::close(out[0]);
  if (failed != 0) {
    std::cerr << "postern: ssh-keyscan: " << std::strerror(failed) << "\n";
    return {};
  }
  while (::waitpid(pid, nullptr, 0) < 0 && errno == EINTR) {}

  std::vector<std::string> keys;
  std::size_t begin = 0;
  for (std::size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
    const std::string line = text.substr(begin, end - begin);
    const auto space = line.find(' ');
    if (line.empty() || line.front() == '#' || space == std::string::npos) continue;
    const std::string key = line.substr(space + 1);
    if (std::count(key.begin(), key.end(), ' ') == 1 && std::all_of(key.begin(), key.end(), [](unsigned char c) { return std::isprint(c); })) keys.push_back(key);
  }
  return keys;
}

/// ssh takes any exit status but 0 for the end of the connection; to know nothing is none. Then it asks as without us.
void run(const Options& o) {
  const auto wanted = read_wanted(o.host);
  if (!wanted) {
    std::cerr << "postern: known-hosts: \"" << o.host << "\" is no host as known_hosts has it\n";
    return;
  }
  const auto network = ask_network(o);
  if (!network) {
    std::cerr << "postern: known-hosts: " << network.error().doing << "\n";
    return;
  }
  const auto literal = Address::parse(wanted->host);
  for (const auto& address : literal ? std::vector{*literal} : resolve(wanted->host)) {
    const Node* node = network->find(address);
    // A resolver's word is not the network's: the name must be the node's own.
    if (node == nullptr || (!literal && !is_called(*node, wanted->host))) continue;
    const unsigned port = o.port != 0 ? o.port : wanted->port;
    // One kind is one connection; the first that it has is enough.
    for (const char* types : {"ed25519", "ecdsa", "rsa"}) {
      const auto keys = scan(address, port, types, o.timeout);
      for (const auto& key : keys) std::cout << o.host << " " << key << "\n";
      if (!keys.empty()) return;
    }
  }
}

}  // namespace

void add_known_hosts(CLI::App& app) {
  auto options = std::make_shared<Options>();
  auto* const command = app.add_subcommand("known-hosts", "on a client: host keys of a node of the network, for ssh's KnownHostsCommand; nothing for any other host");
  command->add_option("HOST", options->host, "ssh's %H: a name, an address, or [either]:port")->required();
  auto* const nodes = command->add_option("--nodes", options->nodes, "ask a file of nodes (docs/SETTINGS.md, provider static)");
  command->add_option("--tailscaled", options->socket, "ask tailscaled by this socket")->capture_default_str()->excludes(nodes);
  command->add_option("--port", options->port, "the server's, where HOST does not tell it (a HostKeyAlias)")->check(CLI::Range(1, 65535));
  command->add_option("--timeout", options->timeout, "seconds, for each of the network's answer and the server's")->capture_default_str()->check(CLI::Range(1, 60));
  command->callback([options] { run(*options); });
}

}  // namespace postern::cli
