#include "recorder/cast/decoder.h"

#include "recorder/cast/text.h"

#include <nlohmann/json.hpp>

namespace postern::recorder::cast {
namespace {

using Json = nlohmann::json;

std::string text_of(const Json& object, const char* name) {
  const auto it = object.find(name);
  return it != object.end() && it->is_string() ? it->get<std::string>() : std::string{};
}

std::uint32_t number_of(const Json& object, const char* name) {
  const auto it = object.find(name);
  if (it == object.end() || !it->is_number_unsigned()) return 0;
  return static_cast<std::uint32_t>(std::min<std::uint64_t>(it->get<std::uint64_t>(), UINT32_MAX));
}

}  // namespace

std::optional<Header> parse_header(std::string_view line) {
  const Json json = Json::parse(line.begin(), line.end(), nullptr, false);
  if (!json.is_object()) return std::nullopt;
  const auto version = json.find("version");
  if (version == json.end() || !version->is_number_integer() || *version != 2) return std::nullopt;
  Header h;
  h.width = number_of(json, "width");
  h.height = number_of(json, "height");
  if (const auto it = json.find("timestamp"); it != json.end() && it->is_number()) h.timestamp = it->get<std::int64_t>();
  // A cast without the member is a foreign one: its terminal size says whether there was a terminal (Tailscale: 0x0 without).
  if (const auto it = json.find("pty"); it != json.end() && it->is_boolean())
    h.pty = it->get<bool>();
  else
    h.pty = h.width > 0 && h.height > 0;
  h.recording_id = text_of(json, "recordingID");
  h.connection_id = text_of(json, "connectionID");
  h.kind = text_of(json, "kind");
  if (h.kind.empty()) h.kind = "session";
  h.command = text_of(json, "command");
  h.original_command = text_of(json, "originalCommand");
  h.subsystem = text_of(json, "subsystem");
  h.src_node = text_of(json, "srcNode");
  h.src_node_id = text_of(json, "srcNodeID");
  h.src_address = text_of(json, "srcAddress");
  h.src_user = text_of(json, "srcNodeUser");
  if (const auto it = json.find("srcNodeTags"); it != json.end() && it->is_array())
    for (const auto& tag : *it)
      if (tag.is_string()) h.src_tags.push_back(tag.get<std::string>());
  h.dst_node_id = text_of(json, "dstNodeID");
  h.dst_address = text_of(json, "dstAddress");
  h.ssh_user = text_of(json, "sshUser");
  h.local_user = text_of(json, "localUser");
  h.rule = text_of(json, "rule");
  if (const auto it = json.find("env"); it != json.end() && it->is_object()) h.term = text_of(*it, "TERM");
  return h;
}

void Decoder::problem(const std::string& what) const {
  if (handlers_.problem) handlers_.problem(line_, what);
}

void Decoder::feed(std::string_view bytes) {
  while (!bytes.empty()) {
    const std::size_t end = bytes.find('\n');
    const std::string_view part = bytes.substr(0, end);
    if (!skipping_ && partial_.size() + part.size() > longest_line) {
      problem("the line is too long");
      skipping_ = true;
      partial_.clear();
    }
    if (end == std::string_view::npos) {
      if (!skipping_) partial_ += part;
      return;
    }
    if (skipping_) {
      skipping_ = false;
    } else if (partial_.empty()) {
      line(part);
    } else {
      partial_ += part;
      line(partial_);
      partial_.clear();
    }
    line_++;
    bytes.remove_prefix(end + 1);
  }
}

bool Decoder::finish() {
  if (skipping_ || !partial_.empty()) {
    if (!skipping_) problem("the last line is cut");
    partial_.clear();
    return false;
  }
  if (!header_seen_) {
    problem("there is no header");
    return false;
  }
  return true;
}

void Decoder::line(std::string_view text) {
  if (!header_seen_) {
    header_seen_ = true;
    if (const auto header = parse_header(text)) {
      if (handlers_.header) handlers_.header(*header);
      return;
    }
    problem("not an asciicast v2 header");
    return;
  }
  if (text.empty()) return;
  const Json json = Json::parse(text.begin(), text.end(), nullptr, false);
  if (!json.is_array() || json.size() < 3 || !json[0].is_number() || !json[1].is_string() || !json[2].is_string()) {
    problem("not an event");
    return;
  }
  Event event{json[0].get<double>(), json[1].get<std::string>(), json[2].get<std::string>(), {}};
  if (event.code == "b") {
    const std::string& t = event.text;
    const bool named = t.size() >= 2 && (t[0] == 'o' || t[0] == 'e' || t[0] == 'i') && t[1] == ' ';
    auto exact = named ? parse_base64(std::string_view{t}.substr(2)) : std::nullopt;
    if (!exact)
      problem("exact bytes that are not \"<o|e|i> <base64>\"");
    else
      exact_[t[0]] = std::move(*exact);
    return;
  }
  event.bytes = event.text;
  if (event.code.size() == 1)
    if (const auto it = exact_.find(event.code[0]); it != exact_.end()) {
      event.bytes = std::move(it->second);
      exact_.erase(it);
    }
  if (handlers_.event) handlers_.event(event);
}

}  // namespace postern::recorder::cast
