#include "recorder/cast/encoder.h"

#include "recorder/cast/text.h"

#include <algorithm>
#include <array>
#include <charconv>

namespace postern::recorder::cast {
namespace {

constexpr std::size_t most_in_one_event = 64 * 1024;

void append_number(std::int64_t number, std::string& out) {
  std::array<char, 24> digits;
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr;
  out.append(digits.data(), end);
}

void append_member(std::string_view name, std::string_view value, std::string& out) {
  out += ",\"";
  out += name;
  out += "\":\"";
  append_lossy_text(value, out);
  out += '"';
}

void append_member(std::string_view name, std::int64_t value, std::string& out) {
  out += ",\"";
  out += name;
  out += "\":";
  append_number(value, out);
}

}  // namespace

std::string encode_header(const Header& header) {
  // Tailscale's names where Tailscale has the member (sessionrecording/header.go), their style for ours. Empty ones are left out.
  std::string out = "{\"version\":2";
  append_member("width", header.width, out);
  append_member("height", header.height, out);
  append_member("timestamp", header.timestamp, out);
  const auto text = [&](std::string_view name, const std::string& value) {
    if (!value.empty()) append_member(name, value, out);
  };
  text("command", header.command);
  text("originalCommand", header.original_command);
  if (!header.term.empty()) {
    out += ",\"env\":{\"TERM\":\"";
    append_lossy_text(header.term, out);
    out += "\"}";
  }
  text("srcNode", header.src_node);
  text("srcNodeID", header.src_node_id);
  if (!header.src_tags.empty()) {
    out += ",\"srcNodeTags\":[";
    for (std::size_t i = 0; i < header.src_tags.size(); i++) {
      out += i == 0 ? "\"" : ",\"";
      append_lossy_text(header.src_tags[i], out);
      out += '"';
    }
    out += ']';
  }
  text("srcNodeUser", header.src_user);
  text("sshUser", header.ssh_user);
  text("localUser", header.local_user);
  text("connectionID", header.connection_id);
  text("recordingID", header.recording_id);
  text("kind", header.kind);
  out += header.pty ? ",\"pty\":true" : ",\"pty\":false";
  text("subsystem", header.subsystem);
  text("srcAddress", header.src_address);
  text("dstNodeID", header.dst_node_id);
  text("dstAddress", header.dst_address);
  text("rule", header.rule);
  out += "}\n";
  return out;
}

void Encoder::begin(std::uint64_t now_ns, char code, std::string& out) {
  last_ = std::max(last_, now_ns);
  const std::uint64_t micros = (last_ - start_) / 1000;
  out += '[';
  append_number(static_cast<std::int64_t>(micros / 1'000'000), out);
  char fraction[8] = ".000000";
  auto rest = static_cast<unsigned>(micros % 1'000'000);
  for (int i = 6; i > 0; i--, rest /= 10) fraction[i] = static_cast<char>('0' + rest % 10);
  out.append(fraction, 7);
  out += ",\"";
  out += code;
  out += "\",\"";
}

void Encoder::output(char stream, std::span<const std::byte> bytes, std::uint64_t now_ns, std::string& out) {
  constexpr std::string_view end = "\"]\n";
  const auto exact = [&](std::string_view part, auto&& show) {
    begin(now_ns, 'b', out);
    out += stream;
    out += ' ';
    append_base64(part, out);
    out += end;
    begin(now_ns, stream, out);
    show();
    out += end;
  };
  const auto nothing = [] {};

  std::string_view rest{reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  std::string& cut = cut_[stream];
  if (!cut.empty() && !rest.empty()) {
    // The longest part of this read that the character can still take.
    std::string whole = cut;
    std::size_t taken = 0;
    while (taken < rest.size() && character(whole) == 0) {
      whole += rest[taken];
      if (!is_cut_character(whole) && character(whole) == 0) {
        whole.pop_back();
        break;
      }
      taken++;
    }
    const std::string_view part = rest.substr(0, taken);
    rest.remove_prefix(taken);
    if (character(whole) == whole.size()) {
      cut.clear();
      exact(part, [&] { append_text(whole, out); });
    } else if (rest.empty()) {
      cut = whole;
      exact(part, nothing);
    } else {
      // It never was a character: shown now, for bytes that stand further up.
      cut.clear();
      exact(part, [&] { append_lossy_text(whole, out); });
    }
  }

  while (!rest.empty()) {
    std::string_view piece = rest.substr(0, most_in_one_event);
    if (piece.size() < rest.size()) piece.remove_suffix(cut_at_end(piece));  // our own cut need not be through a character
    rest.remove_prefix(piece.size());

    const std::size_t before = out.size();
    begin(now_ns, stream, out);
    const std::size_t taken = append_text(piece, out);
    if (taken == piece.size()) {
      out += end;
      continue;
    }
    const std::string_view bad = piece.substr(taken);
    if (rest.empty() && is_cut_character(bad)) {
      if (taken > 0)
        out += end;
      else
        out.resize(before);
      cut = bad;
      exact(bad, nothing);
      continue;
    }
    out.resize(before);
    const std::size_t tail = rest.empty() ? cut_at_end(piece) : 0;
    cut = piece.substr(piece.size() - tail);
    exact(piece, [&] { append_lossy_text(piece.substr(0, piece.size() - tail), out); });
  }
}

void Encoder::input(std::span<const std::byte> bytes, std::uint64_t now_ns, std::string& out) { output('i', bytes, now_ns, out); }

void Encoder::resize(std::uint32_t cols, std::uint32_t rows, std::uint64_t now_ns, std::string& out) {
  begin(now_ns, 'r', out);
  append_number(cols, out);
  out += 'x';
  append_number(rows, out);
  out += "\"]\n";
}

void Encoder::exit(std::string_view status_or_signal, std::uint64_t now_ns, std::string& out) {
  begin(now_ns, 'x', out);
  append_lossy_text(status_or_signal, out);
  out += "\"]\n";
}

}  // namespace postern::recorder::cast
