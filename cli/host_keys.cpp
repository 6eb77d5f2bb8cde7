// postern host-keys: what clients need to know this server by, and the change of its keys. Asks posternd, which alone can read them.
#include "cli/command.h"
#include "cli/control.h"

#include "base/address.h"

#include <CLI/CLI.hpp>

#include <sodium.h>

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iostream>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace postern::cli {
namespace {

using json = nlohmann::json;

struct Key {
  std::string line, fingerprint, use;
  int bits = 0;
  std::string type() const { return line.substr(0, line.find(' ')); }
  bool known_to_clients() const { return use != "retired"; }
};

/// As ssh-keygen -l names it.
std::string short_type(const std::string& type) { return type == "ssh-ed25519" ? "ED25519" : type == "ssh-rsa" ? "RSA" : "ECDSA"; }

/// RFC 4255 section 3.1.1, RFC 6594, RFC 7479: the algorithm's number.
int sshfp_algorithm(const std::string& type) { return type == "ssh-ed25519" ? 4 : type == "ssh-rsa" ? 1 : 3; }

/// "4 2 <hex>": algorithm, SHA-256, the fingerprint of the public blob (RFC 6594 section 2).
std::string sshfp(const Key& key) {
  const std::string text = key.line.substr(key.line.find(' ') + 1);
  std::string blob(text.size(), '\0');
  std::size_t length = 0;
  if (sodium_base642bin(reinterpret_cast<unsigned char*>(blob.data()), blob.size(), text.data(), text.size(), nullptr, &length, nullptr, sodium_base64_VARIANT_ORIGINAL) != 0)
    return {};
  unsigned char digest[crypto_hash_sha256_BYTES];
  crypto_hash_sha256(digest, reinterpret_cast<const unsigned char*>(blob.data()), length);
  char hex[2 * sizeof digest + 1];
  sodium_bin2hex(hex, sizeof hex, digest, sizeof digest);
  return std::to_string(sshfp_algorithm(key.type())) + " 2 " + hex;
}

/// As known_hosts has it (sshd(8)): "name", or "[name]:port" where that is not 22.
std::string host_pattern(const std::string& name, unsigned port) { return port == 22 ? name : "[" + name + "]:" + std::to_string(port); }

struct Server {
  std::vector<Key> keys;
  std::vector<std::string> names;  ///< of the network, without addresses
  std::vector<Endpoint> dialled;   ///< what clients connect to
  std::vector<unsigned> ports;
};

Server ask_server(const std::string& socket) {
  const auto answer = ask(socket, {{"command", "status"}});
  if (!answer) {
    std::cerr << "postern: " << answer.error().doing << "\n";
    throw Exit{1};
  }
  Server server;
  for (const auto& k : (*answer)["host_keys"]) server.keys.push_back({k["line"], k["fingerprint"], k["use"], k["bits"]});
  for (const auto& e : (*answer)["dialled"])
    if (const auto endpoint = Endpoint::parse(e.get<std::string>(), 22)) server.dialled.push_back(*endpoint);
  for (const auto& n : (*answer)["names"]) server.names.push_back(n);
  for (const auto& e : server.dialled) server.ports.push_back(e.port);
  if (server.dialled.empty())  // on any address, and the network does not say which there are
    for (const auto& e : (*answer)["listening"])
      if (const auto endpoint = Endpoint::parse(e.get<std::string>(), 22)) server.ports.push_back(endpoint->port);
  if (char host[256]; server.names.empty() && ::gethostname(host, sizeof host) == 0) server.names.emplace_back(host, ::strnlen(host, sizeof host));
  return server;
}

/// What known_hosts calls this server: its names at each of its ports, its addresses.
std::string patterns(const Server& server, const std::vector<std::string>& names) {
  std::vector<std::string> all;
  const auto add = [&](std::string pattern) {
    if (std::find(all.begin(), all.end(), pattern) == all.end()) all.push_back(std::move(pattern));
  };
  for (const auto& name : names)
    for (const auto port : server.ports) add(host_pattern(name, port));
  for (const auto& e : server.dialled) add(host_pattern(e.address.text(), e.port));
  std::string text;
  for (const auto& p : all) text += (text.empty() ? "" : ",") + p;
  return text;
}

struct Options {
  std::vector<std::string> names;
  bool json = false, fingerprints = false, sshfp = false, known_hosts = false, finish = false;
};

void show(const std::string& socket, const Options& o) {
  const Server server = ask_server(socket);
  const auto& names = o.names.empty() ? server.names : o.names;
  const std::string hosts = patterns(server, names);
  if (o.json) {
    json keys = json::array();
    for (const auto& k : server.keys)
      keys.push_back({{"type", k.type()}, {"bits", k.bits}, {"fingerprint", k.fingerprint}, {"line", k.line}, {"use", k.use}, {"sshfp", sshfp(k)},
                      {"known_hosts", k.known_to_clients() ? json(hosts + " " + k.line) : json(nullptr)}});
    std::cout << json{{"names", names}, {"host_keys", keys}}.dump() << "\n";
    return;
  }
  const bool all = !o.fingerprints && !o.sshfp && !o.known_hosts;
  if (all) std::cout << "# fingerprints, as ssh shows them\n";
  if (all || o.fingerprints)
    for (const auto& k : server.keys)
      std::cout << k.bits << " " << k.fingerprint << " (" << short_type(k.type()) << ")"
                << (k.use == "announced" ? " to come: clients learn it" : k.use == "retired" ? " retired" : "") << "\n";
  if (all) std::cout << "\n# lines for known_hosts\n";
  if (all || o.known_hosts)
    for (const auto& k : server.keys)
      if (k.known_to_clients()) std::cout << hosts << " " << k.line << "\n";
  if (all) std::cout << "\n# SSHFP records for a signed DNS zone (RFC 4255)\n";
  if (all || o.sshfp)
    for (const auto& name : names)
      for (const auto& k : server.keys)
        if (k.known_to_clients()) std::cout << name << " IN SSHFP " << sshfp(k) << "\n";
}

void rotate(const std::string& socket, bool finish) {
  const auto answer = ask(socket, {{"command", "rotate-host-keys"}, {"finish", finish}});
  if (!answer) {
    std::cerr << "postern: " << answer.error().doing << "\n";
    throw Exit{1};
  }
  std::cout << (finish ? "The new keys are in use. Live connections keep the old ones until they end.\n"
                       : "New keys are there, and clients with UpdateHostKeys (OpenSSH: the default for hosts that they know) learn them at their next login.\n"
                         "When those that matter have been here: postern host-keys rotate --finish\n");
}

}  // namespace

void add_host_keys(CLI::App& app, const Globals& globals) {
  auto options = std::make_shared<Options>();
  CLI::App* keys = app.add_subcommand("host-keys", "fingerprints, known_hosts lines and SSHFP records of this server");
  keys->add_option("--name", options->names, "a name that clients use for it, in place of the network's names");
  keys->add_flag("--fingerprints", options->fingerprints, "fingerprints only");
  keys->add_flag("--known-hosts", options->known_hosts, "known_hosts lines only");
  keys->add_flag("--sshfp", options->sshfp, "SSHFP records only");
  keys->add_flag("--json", options->json, "all of it as one JSON object");
  CLI::App* change = keys->add_subcommand("rotate", "make new keys, which clients learn beside the old ones; then, by --finish, use them");
  change->add_flag("--finish", options->finish, "the new keys take the place of the old ones");
  keys->require_subcommand(0, 1);
  keys->callback([=, &globals] {
    if (change->parsed()) return;
    show(globals.control, *options);
  });
  change->callback([=, &globals] { rotate(globals.control, options->finish); });
}

}  // namespace postern::cli
