#include "sshd/broker/config.h"

#include "base/unique_fd.h"

#include <toml++/toml.h>

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <optional>

namespace postern::sshd::broker {
namespace {

Place place_of(const toml::source_region& source, std::string_view file) {
  return {std::string{file}, source.begin.line, source.begin.column};
}

// Walks one section; what the caller did not ask for is reported by finish().
class Section {
 public:
  Section(const toml::table& root, std::string name, std::string_view file, std::vector<Problem>& problems)
      : name_{std::move(name)}, file_{file}, problems_{problems} {
    const toml::node* node = root.get(name_);
    if (node == nullptr) return;
    table_ = node->as_table();
    if (table_ == nullptr) problems_.push_back({place_of(node->source(), file_), name_, "must be a table, [" + name_ + "]", ""});
  }
  ~Section() {
    if (table_ == nullptr) return;
    for (auto&& [key, node] : *table_) {
      const std::string_view k{key};
      if (std::find(known_.begin(), known_.end(), k) == known_.end())
        problems_.push_back({place_of(node.source(), file_), name_ + "." + std::string{k}, "unknown key", known_list()});
    }
  }
  Section(const Section&) = delete;
  Section& operator=(const Section&) = delete;

  void text(std::string_view key, std::string& out, bool may_be_empty = false) {
    if (const toml::node* node = find(key)) {
      if (const auto v = node->value_exact<std::string>()) {
        if (v->empty() && !may_be_empty) return fail(*node, key, "must not be empty");
        if (v->find('\0') != std::string::npos) return fail(*node, key, "must not contain NUL");
        out = *v;
      } else {
        fail(*node, key, "must be a string");
      }
    }
  }
  /// A path that has to be absolute and fit a sockaddr_un when `socket`.
  void path(std::string_view key, std::string& out, bool socket = false, bool may_be_empty = false) {
    const std::string before = out;
    text(key, out, may_be_empty);
    const toml::node* node = peek(key);
    if (node == nullptr || out == before || out.empty()) return;
    if (out[0] != '/') fail(*node, key, "must be an absolute path");
    else if (socket && out.size() > 107) fail(*node, key, "is too long for a unix socket (107 bytes at most, unix(7))");
  }
  void flag(std::string_view key, bool& out) {
    if (const toml::node* node = find(key)) {
      if (const auto v = node->value_exact<bool>()) out = *v;
      else fail(*node, key, "must be true or false");
    }
  }
  template <class Integer>
  void number(std::string_view key, Integer& out, std::int64_t least, std::int64_t most) {
    if (const toml::node* node = find(key)) {
      const auto v = node->value_exact<std::int64_t>();
      if (!v) return fail(*node, key, "must be a whole number");
      if (*v < least || *v > most)
        return fail(*node, key, "must be from " + std::to_string(least) + " to " + std::to_string(most));
      out = static_cast<Integer>(*v);
    }
  }
  template <class Duration>
  void duration(std::string_view key, Duration& out, std::chrono::milliseconds least, std::chrono::milliseconds most) {
    if (const toml::node* node = find(key)) {
      const auto v = node->value_exact<std::string>();
      const auto d = v ? parse_duration(*v) : std::nullopt;
      if (!d) return fail(*node, key, "must be a duration", "a string such as \"500ms\", \"10s\", \"5m\", \"2h\"");
      if (*d < least || *d > most)
        return fail(*node, key, "must be from " + std::to_string(least.count()) + "ms to " + std::to_string(most.count()) + "ms");
      out = std::chrono::duration_cast<Duration>(*d);
    }
  }
  const toml::node* find(std::string_view key) {
    known_.emplace_back(key);
    return peek(key);
  }
  void fail(const toml::node& node, std::string_view key, std::string what, std::string hint = {}) {
    problems_.push_back({place_of(node.source(), file_), name_ + "." + std::string{key}, std::move(what), std::move(hint)});
  }

 private:
  const toml::node* peek(std::string_view key) const { return table_ == nullptr ? nullptr : table_->get(key); }
  std::string known_list() const {
    std::string out = "known here: ";
    for (const auto& k : known_) out += (&k == &known_.front() ? "" : ", ") + k;
    return out;
  }

  std::string name_;
  std::string_view file_;
  std::vector<Problem>& problems_;
  const toml::table* table_ = nullptr;
  std::vector<std::string> known_;
};

}  // namespace

std::optional<std::chrono::milliseconds> parse_duration(std::string_view text) {
  std::uint32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end == text.data()) return std::nullopt;
  const std::string_view unit{end, static_cast<std::size_t>(text.data() + text.size() - end)};
  using std::chrono::milliseconds;
  if (unit == "ms") return milliseconds{value};
  if (unit == "s") return milliseconds{std::int64_t{value} * 1000};
  if (unit == "m") return milliseconds{std::int64_t{value} * 60'000};
  if (unit == "h") return milliseconds{std::int64_t{value} * 3'600'000};
  return std::nullopt;
}

Expected<Config, std::vector<Problem>> parse_config(std::string_view text, std::string_view file_name) {
  using namespace std::chrono_literals;
  std::vector<Problem> problems;
  toml::table root;
  try {
    root = toml::parse(text, file_name);
  } catch (const toml::parse_error& e) {
    return Unexpected{std::vector<Problem>{{place_of(e.source(), file_name), "", std::string{e.description()}, ""}}};
  }
  Config c;
  static constexpr std::string_view sections[] = {"listen", "policy", "identity", "host_keys", "programs", "control", "relay",
                                                  "recorder", "sandbox", "pam", "session", "limits", "log", "ssh"};
  for (auto&& [key, node] : root)
    if (std::find(std::begin(sections), std::end(sections), std::string_view{key}) == std::end(sections))
      problems.push_back({place_of(node.source(), file_name), std::string{std::string_view{key}}, "unknown section", ""});
  {
    Section s{root, "listen", file_name, problems};
    const toml::node* node = s.find("addresses");
    const toml::array* list = node ? node->as_array() : nullptr;
    if (node == nullptr) {
      problems.push_back({{std::string{file_name}, 1, 1}, "listen.addresses", "missing: where to listen",
                          "[listen] addresses = [\"100.64.0.1:22\"]"});
    } else if (list == nullptr || list->empty()) {
      s.fail(*node, "addresses", "must be a list of addresses", "[\"100.64.0.1:22\", \"[fd7a::1]:22\"]");
    } else {
      for (const auto& entry : *list) {
        const auto v = entry.value_exact<std::string>();
        const auto endpoint = v ? Endpoint::parse(*v, 22) : std::nullopt;
        if (endpoint) c.listen.addresses.push_back(*endpoint);
        else s.fail(entry, "addresses", "must be address:port with a numeric address", "\"100.64.0.1:22\" or \"[fd7a::1]:22\"");
      }
    }
  }
  {
    Section s{root, "policy", file_name, problems};
    s.path("file", c.policy.file);
    s.flag("require_network_rule", c.policy.require_network_rule);
  }
  {
    Section s{root, "identity", file_name, problems};
    s.text("provider", c.identity.provider);
    if (const toml::node* node = s.find("provider"); node && c.identity.provider != "static")
      s.fail(*node, "provider", "unknown provider", "\"static\"");
    s.path("file", c.identity.file);
  }
  {
    Section s{root, "host_keys", file_name, problems};
    s.path("dir", c.host_keys.dir);
  }
  {
    Section s{root, "programs", file_name, problems};
    s.path("dir", c.programs.dir, false, true);
  }
  {
    Section s{root, "control", file_name, problems};
    s.path("socket", c.control.socket, true);
    s.path("registration_socket", c.control.registration_socket, true);
  }
  {
    Section s{root, "relay", file_name, problems};
    s.path("socket", c.relay.socket, true);
  }
  {
    Section s{root, "recorder", file_name, problems};
    s.number("port", c.recorder.port, 1, 65535);
    s.duration("start_timeout", c.recorder.start_timeout, 10ms, 60s);
    s.duration("grace", c.recorder.grace, 0ms, 1h);
  }
  {
    Section s{root, "sandbox", file_name, problems};
    s.text("user", c.sandbox.user);
    s.path("empty_root", c.sandbox.empty_root);
  }
  {
    Section s{root, "pam", file_name, problems};
    s.text("service", c.pam.service);
    if (const toml::node* node = s.find("service"); node && (c.pam.service.size() > 64 || c.pam.service.find('/') != std::string::npos))
      s.fail(*node, "service", "must be the name of a file in pam.d, 64 bytes at most");
    s.path("confdir", c.pam.confdir, false, true);
  }
  {
    Section s{root, "session", file_name, problems};
    s.path("sftp_server", c.session.sftp_server, false, true);
    s.duration("orphan_limit", c.session.orphan_limit, 1s, 24h);
  }
  {
    Section s{root, "limits", file_name, problems};
    s.duration("login_grace_time", c.limits.login_grace_time, 100ms, 1h);
    s.number("auth_attempts", c.limits.auth_attempts, 1, 100);
    s.number("unauthenticated_connections", c.limits.unauthenticated_connections, 1, 100'000);
    s.number("unauthenticated_connections_per_source", c.limits.unauthenticated_connections_per_source, 1, 100'000);
    s.number("sessions_per_connection", c.limits.sessions_per_connection, 0, 10'000);
    s.number("connections", c.limits.connections, 1, 1'000'000);
    s.number("warm_workers", c.limits.warm_workers, 0, 1000);
    s.duration("crash_penalty", c.limits.crash_penalty, 0ms, 24h);
  }
  {
    Section s{root, "log", file_name, problems};
    s.text("level", c.log.level);
    static constexpr std::string_view levels[] = {"trace", "debug", "info", "warning", "error"};
    if (const toml::node* node = s.find("level"); node && std::find(std::begin(levels), std::end(levels), c.log.level) == std::end(levels))
      s.fail(*node, "level", "unknown level", "trace, debug, info, warning or error");
  }
  {
    Section s{root, "ssh", file_name, problems};
    s.text("version_string", c.ssh.version_string);
    const auto& v = c.ssh.version_string;
    const bool printable = std::all_of(v.begin(), v.end(), [](unsigned char ch) { return ch > 0x20 && ch < 0x7f && ch != '-'; });
    if (const toml::node* node = s.find("version_string"); node && (!printable || v.size() > 64))
      s.fail(*node, "version_string", "must be 1 to 64 printable characters without blanks or \"-\" (RFC 4253 section 4.2)");
  }
  if (!problems.empty()) {
    std::stable_sort(problems.begin(), problems.end(), [](const Problem& a, const Problem& b) {
      return std::pair{a.place.line, a.place.column} < std::pair{b.place.line, b.place.column};
    });
    return Unexpected{std::move(problems)};
  }
  return c;
}

Expected<std::string> read_whole_file(const std::string& path, std::size_t largest) {
  const UniqueFd fd{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (!fd) return Unexpected{system_error("open " + path)};
  std::string out;
  char buffer[65536];
  for (;;) {
    const ssize_t n = ::read(fd.get(), buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Unexpected{system_error("read " + path)};
    if (n == 0) return out;
    if (out.size() + static_cast<std::size_t>(n) > largest) return Unexpected{system_error("read " + path, EFBIG)};
    out.append(buffer, static_cast<std::size_t>(n));
  }
}

}  // namespace postern::sshd::broker
