// postern recordings ls: what is recorded, where, and what is not yet anywhere.

#include "cli/recordings.h"

#include "base/log.h"
#include "base/unique_fd.h"
#include "cli/command.h"
#include "cli/http.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <iomanip>
#include <iostream>
#include <map>
#include <memory>
#include <sstream>

namespace postern::cli {
namespace {

using Json = nlohmann::json;

constexpr const char* default_relay = "/run/postern-relay/control.sock";
constexpr std::size_t largest_line = 1024 * 1024;

struct Options {
  std::vector<std::string> recorders;
  std::string relay;
  bool json = false;
  std::string bind_to;
};

std::string text(const Json& json, const char* name) {
  const auto it = json.find(name);
  return it != json.end() && it->is_string() ? it->get<std::string>() : std::string{};
}

std::uint64_t number(const Json& json, const char* name) {
  const auto it = json.find(name);
  return it != json.end() && it->is_number_unsigned() ? it->get<std::uint64_t>() : 0;
}

bool truth(const Json& json, const char* name) {
  const auto it = json.find(name);
  return it != json.end() && it->is_boolean() && it->get<bool>();
}

/// The better a copy, the lower.
int rank(const std::string& state) {
  constexpr const char* order[] = {"conflict", "whole", "live", "stalled", "cut", "moved"};
  const auto* const it = std::find(std::begin(order), std::end(order), state);
  return static_cast<int>(it - std::begin(order));
}

/// Feeds whole lines of JSON objects to `take`; what is none is left out.
class Lines {
 public:
  explicit Lines(std::function<void(Json)> take) : take_{std::move(take)} {}
  void feed(std::string_view bytes) {
    while (!bytes.empty()) {
      const auto end = bytes.find('\n');
      if (partial_.size() < largest_line) partial_ += bytes.substr(0, end);
      if (end == std::string_view::npos) return;
      bytes.remove_prefix(end + 1);
      Json json = Json::parse(partial_, nullptr, false);
      partial_.clear();
      if (json.is_object()) take_(std::move(json));
    }
  }

 private:
  std::function<void(Json)> take_;
  std::string partial_;
};

Expected<std::vector<Json>> ask_relay(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return Unexpected{Error{ENAMETOOLONG, path + ": too long for a socket"}};
  std::memcpy(address.sun_path, path.data(), path.size());
  const UniqueFd socket{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  const timeval limit{10, 0};
  ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
  if (!socket || ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return Unexpected{system_error("relay " + path)};
  std::vector<Json> lines;
  bool whole = false;
  Lines reader{[&](Json json) {
    if (json.contains("end"))
      whole = true;
    else if (json.contains("id"))
      lines.push_back(std::move(json));
  }};
  std::string piece(64 * 1024, '\0');
  for (;;) {
    const ssize_t n = ::read(socket.get(), piece.data(), piece.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Unexpected{system_error("relay " + path)};
    if (n == 0) break;
    reader.feed({piece.data(), static_cast<std::size_t>(n)});
  }
  if (!whole) return Unexpected{Error{EACCES, "relay " + path + ": no list (only root and the relay's user get one)"}};
  return lines;
}

Expected<std::vector<Copy>> ask_recorder(const std::string& name, const std::string& bind_to) {
  auto url = parse_url(name);
  if (!url) return Unexpected{url.error()};
  url->target = "/postern/v1/recordings";
  std::vector<Copy> copies;
  unsigned status = 0;
  const std::string origin = url->origin();
  Lines reader{[&](Json json) {
    if (!text(json, "id").empty()) copies.push_back({origin, std::move(json)});
  }};
  auto done = http_get(
      *url, bind_to,
      [&](const Answer& answer) {
        status = answer.status;
        return status == 200;
      },
      [&](std::string_view bytes) {
        reader.feed(bytes);
        return true;
      });
  if (!done) return Unexpected{done.error()};
  if (status != 200) return Unexpected{Error{EACCES, "recorder " + origin + ": HTTP status " + std::to_string(status)}};
  return copies;
}

/// Somebody else's text in a table of ours.
std::string plain(const std::string& s, std::size_t most) {
  std::string q = safe_quoted(s, most);
  return q.size() >= 2 ? q.substr(1, q.size() - 2) : q;
}

void print_table(const std::vector<Json>& entries) {
  std::cout << std::left << std::setw(27) << "ID" << std::setw(24) << "STATE" << std::setw(22) << "WHERE" << std::right << std::setw(12) << "BYTES"
            << std::left << "  " << std::setw(20) << "STARTED (UTC)" << std::setw(28) << "WHO" << "COMMAND\n";
  for (const auto& e : entries) {
    const Json header = e.value("header", Json::object());
    std::string where;
    for (const auto& w : e.value("where", Json::array())) where += (where.empty() ? "" : ",") + w.get<std::string>();
    std::string state = text(e, "state");
    if (const auto gap = e.find("gap"); gap != e.end() && gap->is_object() && state != "gap") state += " + gap";
    const auto started = static_cast<std::time_t>(number(e, "created_ms") / 1000);
    std::tm tm{};
    ::gmtime_r(&started, &tm);
    char when[32];
    std::strftime(when, sizeof when, "%Y-%m-%d %H:%M:%S", &tm);
    std::string who = text(header, "srcNodeUser");
    if (who.empty() && header.contains("srcNodeTags") && header["srcNodeTags"].is_array() && !header["srcNodeTags"].empty() && header["srcNodeTags"][0].is_string())
      who = header["srcNodeTags"][0].get<std::string>();
    const std::string local_user = text(header, "localUser");
    std::string command = text(header, "command");
    if (command.empty() && header.is_object() && !header.empty()) command = text(header, "subsystem").empty() ? "(shell)" : text(header, "subsystem");
    std::cout << std::setw(27) << plain(text(e, "id"), 26) << std::setw(24) << plain(state, 40) << std::setw(22) << (where.empty() ? "-" : plain(where, 60))
              << std::right << std::setw(12) << number(e, "length") << std::left << "  " << std::setw(20) << when << std::setw(28)
              << plain(who + (local_user.empty() ? "" : " as " + local_user), 60) << plain(command, 60) << "\n";
  }
}

void list(const Options& options) {
  std::vector<Copy> copies;
  std::vector<Json> relay;
  unsigned asked = 0, answered = 0;
  const auto tell = [](const Error& e) { std::cerr << "postern recordings: " << e.doing << "\n"; };
  for (const auto& name : options.recorders) {
    asked++;
    auto some = ask_recorder(name, options.bind_to);
    if (!some) {
      tell(some.error());
      continue;
    }
    answered++;
    copies.insert(copies.end(), std::make_move_iterator(some->begin()), std::make_move_iterator(some->end()));
  }
  std::string path = options.relay;
  if (path.empty() && options.recorders.empty()) path = default_relay;
  if (!path.empty()) {
    asked++;
    auto some = ask_relay(path);
    if (some) {
      answered++;
      relay = std::move(*some);
    } else {
      tell(some.error());
    }
  }
  const auto entries = merge(copies, relay);
  if (options.json)
    // ASCII alone: U+009B is a terminal's CSI, and a header may say anything.
    for (const auto& e : entries) std::cout << e.dump(-1, ' ', true, Json::error_handler_t::replace) << "\n";
  else
    print_table(entries);
  if (answered == 0) throw Exit{1};
  if (answered < asked) std::cerr << "postern recordings: the list may be incomplete\n";
}

}  // namespace

std::vector<Json> merge(const std::vector<Copy>& copies, const std::vector<Json>& relay) {
  std::map<std::string, Json> entries;
  const auto entry = [&](const std::string& id) -> Json& {
    auto& e = entries[id];
    if (e.is_null()) e = {{"id", id}, {"state", ""}, {"where", Json::array()}, {"length", 0U}, {"created_ms", 0U}, {"copies", Json::array()}};
    return e;
  };
  const auto seen_at = [](Json& e, std::uint64_t created) {
    if (created != 0 && (number(e, "created_ms") == 0 || created < number(e, "created_ms"))) e["created_ms"] = created;
  };
  for (const auto& c : copies) {
    Json& e = entry(text(c.line, "id"));
    const std::string state = text(c.line, "state");
    Json copy{{"recorder", c.recorder}, {"state", state}, {"length", number(c.line, "length")}};
    for (const char* name : {"moved_to", "reason", "error", "head"})
      if (const auto value = text(c.line, name); !value.empty()) copy[name] = value;
    e["copies"].push_back(copy);
    const std::string best = text(e, "state");
    const bool better = best.empty() || rank(state) < rank(best) || (state == best && number(copy, "length") > number(e, "length"));
    if (better) {
      e["state"] = state;
      e["length"] = number(copy, "length");
      e["where"] = Json::array({c.recorder});
    } else if (state == best) {
      e["where"].push_back(c.recorder);
    }
    if (const auto header = c.line.find("header"); header != c.line.end() && header->is_object() && !e.contains("header")) e["header"] = *header;
    seen_at(e, number(c.line, "created_ms"));
  }
  for (const auto& r : relay) {
    Json& e = entry(text(r, "id"));
    seen_at(e, number(r, "created_ms"));
    if (const auto gap = r.find("gap"); gap != r.end() && gap->is_object()) e["gap"] = *gap;
    if (!e.contains("header"))
      if (Json header = Json::parse(text(r, "header"), nullptr, false); header.is_object()) e["header"] = std::move(header);
    e["journal"] = {{"length", number(r, "length")}, {"committed", number(r, "committed")}, {"session", text(r, "session")}};
    const std::string at = text(r, "recorder");
    if (truth(r, "stored")) {
      e.erase("journal");
      if (!text(e, "state").empty()) continue;  // the recorders said it better
      e["state"] = text(r, "ending") == "cut" ? "cut" : "whole";
      e["where"] = Json::array({at});
      e["length"] = number(r, "length");
      continue;
    }
    if (text(e, "state") == "whole") continue;  // its answer is on its way to the relay
    e["length"] = std::max(number(e, "length"), number(r, "length"));
    if (text(r, "recorder_state") == "recording") {
      e["state"] = text(r, "ending").empty() ? "live" : "uploading";
      e["where"] = Json::array({at});
    } else if (number(r, "length") == 0 && e.contains("gap")) {
      e["state"] = "gap";
    } else {
      e["state"] = "not on a recorder yet";
      e["where"] = Json::array();
    }
  }
  std::vector<Json> list;
  for (auto& [id, e] : entries) list.push_back(std::move(e));
  std::stable_sort(list.begin(), list.end(), [](const Json& a, const Json& b) { return number(a, "created_ms") < number(b, "created_ms"); });
  return list;
}

void add_recordings(CLI::App& app) {
  auto options = std::make_shared<Options>();
  auto* const command = app.add_subcommand("recordings", "recordings on recorders, and on their way there");
  command->require_subcommand(1);
  auto* const ls = command->add_subcommand("ls", "list them, merged by id");
  ls->add_option("--recorder", options->recorders, "a recorder to ask, 127.0.2.1:80 or http://127.0.2.1:80; may be repeated")->envname("POSTERN_RECORDERS")->delimiter(',');
  ls->add_option("--relay,--journal-socket", options->relay,
                 std::string{"the relay's control socket, for what is not on a recorder yet (without --recorder: "} + default_relay + ")")
      ->envname("POSTERN_RELAY_CONTROL");
  ls->add_flag("--json", options->json, "one JSON object a line");
  ls->add_option("--bind", options->bind_to, "address of this machine to ask from");
  ls->callback([options] { list(*options); });
}

}  // namespace postern::cli
