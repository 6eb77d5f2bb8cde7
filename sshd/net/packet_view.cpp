#include "sshd/net/packet_view.h"

#include "sshd/protocol/ssh_wire.h"

namespace postern::sshd::net::ext {

AuthRequest read_auth_request(std::string_view payload) {
  WireView view{payload};
  AuthRequest request;
  const std::string_view user = view.text();
  request.acceptable = view.ok() && !user.empty() && user.size() <= 255;
  for (const char c : user) request.acceptable = request.acceptable && static_cast<unsigned char>(c) >= 0x20 && c != 0x7f;
  view.text();  // service
  request.method = view.text();
  return request;
}

std::optional<ChannelOpen> read_channel_open(std::string_view payload) {
  WireView view{payload};
  ChannelOpen open;
  open.type = view.text();
  open.sender = view.u32();
  open.window = view.u32();
  open.max_packet = view.u32();
  if (!view.ok()) return std::nullopt;
  if (open.type == "direct-tcpip") {  // RFC 4254 section 7.2; where the client's connection comes from is its own tale
    open.target = view.text();
    open.port = view.u32();
    view.text();
    view.u32();
    open.malformed = !view.ok();
  } else if (open.type == "direct-streamlocal@openssh.com") {  // OpenSSH PROTOCOL 2.4
    open.target = view.text();
    open.malformed = !view.ok();
  }
  return open;
}

std::optional<AddressedRequest> read_channel_request(std::string_view payload) {
  using Kind = ChannelRequest::Kind;
  WireView view{payload};
  AddressedRequest addressed;
  addressed.channel = view.u32();
  addressed.name = view.text();
  const std::string& name = addressed.name;
  ChannelRequest& request = addressed.request;
  request.want_reply = view.u8() != 0;
  if (!view.ok()) return std::nullopt;
  const auto size = [&] {
    request.cols = view.u32();
    request.rows = view.u32();
    request.xpixels = view.u32();
    request.ypixels = view.u32();
  };
  if (name == "pty-req") {
    request.kind = Kind::pty;
    request.text = view.text();
    size();
    request.value = view.text();
  } else if (name == "env") {
    request.kind = Kind::env;
    request.text = view.text();
    request.value = view.text();
  } else if (name == "shell") {
    request.kind = Kind::shell;
  } else if (name == "exec") {
    request.kind = Kind::exec;
    request.text = view.text();
  } else if (name == "subsystem") {
    request.kind = Kind::subsystem;
    request.text = view.text();
  } else if (name == "window-change") {
    request.kind = Kind::window_change;
    size();
  } else if (name == "signal") {
    request.kind = Kind::signal;
    request.text = view.text();
  } else if (name == "break") {
    request.kind = Kind::send_break;
    view.u32();  // milliseconds (RFC 4335); tcsendbreak has one length
  } else if (name == "eow@openssh.com") {  // OpenSSH PROTOCOL 2.1: nobody reads the output any more
    request.kind = Kind::end_of_write;
  } else if (name == "auth-agent-req@openssh.com") {
    request.kind = Kind::agent;
  } else if (name == "x11-req") {  // RFC 4254 section 6.3.1
    request.kind = Kind::x11;
    request.single = view.u8() != 0;
    request.text = view.text();
    request.value = view.text();
    request.screen = view.u32();
  }
  if (!view.ok()) request.kind = Kind::other;  // malformed: refused like an unknown one
  return addressed;
}

std::optional<GlobalRequest> read_global_request(std::string_view payload) {
  using Kind = GlobalRequest::Kind;
  WireView view{payload};
  const std::string_view name = view.text();
  GlobalRequest request;
  request.want_reply = view.u8() != 0;
  if (!view.ok()) return std::nullopt;
  if (name == "tcpip-forward" || name == "cancel-tcpip-forward") {  // RFC 4254 section 7.1
    request.kind = name == "tcpip-forward" ? Kind::listen_tcp : Kind::cancel_tcp;
    request.target = view.text();
    request.port = view.u32();
  } else if (name == "streamlocal-forward@openssh.com" || name == "cancel-streamlocal-forward@openssh.com") {  // OpenSSH PROTOCOL 2.4
    request.kind = name == "streamlocal-forward@openssh.com" ? Kind::listen_socket : Kind::cancel_socket;
    request.target = view.text();
  } else if (name == "no-more-sessions@openssh.com") {
    request.kind = Kind::no_more_sessions;
  } else if (name == "hostkeys-prove-00@openssh.com") {  // OpenSSH PROTOCOL 2.5
    request.kind = Kind::prove_host_keys;
    while (view.ok() && !view.at_end() && request.keys.size() < GlobalRequest::most_keys) request.keys.emplace_back(view.text());
    if (!view.at_end()) request.kind = Kind::other;
  }
  if (!view.ok()) request.kind = Kind::other;
  return request;
}

}  // namespace postern::sshd::net::ext
