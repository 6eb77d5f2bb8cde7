#include "sshd/net/packet_view.h"
#include "sshd/protocol/ssh_wire.h"

#include "catch.h"

#include <string>

using namespace postern::sshd::net::ext;
using postern::sshd::WireView;

namespace {

std::string u32(std::uint32_t value) {
  return {static_cast<char>(value >> 24), static_cast<char>(value >> 16), static_cast<char>(value >> 8), static_cast<char>(value)};
}
std::string text(const std::string& s) { return u32(static_cast<std::uint32_t>(s.size())) + s; }
const std::string yes(1, '\1'), no(1, '\0');

}  // namespace

TEST_CASE("what a packet does not hold is not read, and nothing after it", "[net][packet]") {
  WireView view{std::string_view{"\0\0\0\5abc", 7}};  // five bytes are promised, three are there
  CHECK(view.text().empty());
  CHECK_FALSE(view.ok());
  CHECK(view.u8() == 0);
  CHECK(view.u32() == 0);
  WireView huge{std::string_view{"\xff\xff\xff\xff" "abc", 7}};
  CHECK(huge.text().empty());
  CHECK_FALSE(huge.ok());
  WireView nothing{{}};
  CHECK(nothing.ok());
  CHECK(nothing.u8() == 0);
  CHECK_FALSE(nothing.ok());
}

TEST_CASE("a packet is read in the order and the byte order of RFC 4251", "[net][packet]") {
  const std::string bytes = u32(0x01020304) + yes + text("name") + text("");
  WireView view{bytes};
  CHECK(view.u32() == 0x01020304);
  CHECK(view.u8() == 1);
  CHECK(view.text() == "name");
  CHECK(view.text().empty());
  CHECK(view.ok());
}

TEST_CASE("a user name must be 1 to 255 bytes without control characters", "[net][packet]") {
  const auto acceptable = [](const std::string& user) { return read_auth_request(text(user) + text("ssh-connection") + text("none")).acceptable; };
  CHECK(acceptable("alice"));
  CHECK(acceptable(std::string(255, 'a')));
  CHECK(acceptable("\xc3\xa4"));
  CHECK_FALSE(acceptable(""));
  CHECK_FALSE(acceptable(std::string(256, 'a')));
  CHECK_FALSE(acceptable("a\nb"));
  CHECK_FALSE(acceptable(std::string("a\0b", 3)));
  CHECK_FALSE(acceptable("a\x7f"));
  CHECK_FALSE(read_auth_request(u32(6) + "alice").acceptable);
  CHECK(read_auth_request(text("alice") + text("ssh-connection") + text("gssapi-with-mic") + u32(0)).method == "gssapi-with-mic");
}

TEST_CASE("a channel's target is read where its type has one", "[net][packet]") {
  const std::string rest = u32(7) + u32(100) + u32(200);
  auto open = read_channel_open(text("direct-tcpip") + rest + text("host") + u32(80) + text("127.0.0.1") + u32(4711));
  REQUIRE(open);
  CHECK(open->sender == 7);
  CHECK(open->window == 100);
  CHECK(open->max_packet == 200);
  CHECK(open->target == "host");
  CHECK(open->port == 80);
  CHECK_FALSE(open->malformed);
  open = read_channel_open(text("direct-streamlocal@openssh.com") + rest + text("/run/x") + text("") + u32(0));
  REQUIRE(open);
  CHECK(open->target == "/run/x");
  open = read_channel_open(text("session") + rest + text("host"));
  REQUIRE(open);
  CHECK(open->target.empty());
  open = read_channel_open(text("direct-tcpip") + rest + text("host") + u32(80));
  REQUIRE(open);
  CHECK(open->malformed);
  CHECK_FALSE(read_channel_open(text("session") + u32(7) + u32(100)));
}

TEST_CASE("a channel request that breaks off is one that nobody knows, and is answered", "[net][packet]") {
  using Kind = ChannelRequest::Kind;
  const auto kind = [](const std::string& name, const std::string& rest) {
    const auto request = read_channel_request(u32(3) + text(name) + yes + rest);
    REQUIRE(request);
    CHECK(request->channel == 3);
    CHECK(request->request.want_reply);
    return request->request.kind;
  };
  const std::string size = u32(80) + u32(24) + u32(0) + u32(0);
  CHECK(kind("pty-req", text("xterm") + size + text("")) == Kind::pty);
  CHECK(kind("pty-req", text("xterm") + size) == Kind::other);
  CHECK(kind("env", text("LANG") + text("C")) == Kind::env);
  CHECK(kind("env", text("LANG")) == Kind::other);
  CHECK(kind("shell", "") == Kind::shell);
  CHECK(kind("exec", text("true")) == Kind::exec);
  CHECK(kind("exec", u32(5) + "true") == Kind::other);
  CHECK(kind("subsystem", text("sftp")) == Kind::subsystem);
  CHECK(kind("window-change", size) == Kind::window_change);
  CHECK(kind("window-change", u32(80)) == Kind::other);
  CHECK(kind("signal", text("TERM")) == Kind::signal);
  CHECK(kind("break", u32(500)) == Kind::send_break);
  CHECK(kind("break", "") == Kind::other);
  CHECK(kind("eow@openssh.com", "") == Kind::end_of_write);
  CHECK(kind("auth-agent-req@openssh.com", "") == Kind::agent);
  CHECK(kind("x11-req", no + text("MIT-MAGIC-COOKIE-1") + text("00") + u32(0)) == Kind::x11);
  CHECK(kind("x11-req", no + text("MIT-MAGIC-COOKIE-1") + text("00")) == Kind::other);
  CHECK(kind("no-such-request", "anything") == Kind::other);
  CHECK_FALSE(read_channel_request(u32(3) + text("shell")));  // whether an answer is wanted is not said
}

TEST_CASE("a global request is known by its name", "[net][packet]") {
  using Kind = GlobalRequest::Kind;
  const auto kind = [](const std::string& name, const std::string& rest) {
    const auto request = read_global_request(text(name) + no + rest);
    REQUIRE(request);
    CHECK_FALSE(request->want_reply);
    return request->kind;
  };
  CHECK(kind("tcpip-forward", text("") + u32(8080)) == Kind::listen_tcp);
  CHECK(kind("tcpip-forward", text("")) == Kind::other);
  CHECK(kind("cancel-tcpip-forward", text("") + u32(8080)) == Kind::cancel_tcp);
  CHECK(kind("streamlocal-forward@openssh.com", text("/run/x")) == Kind::listen_socket);
  CHECK(kind("cancel-streamlocal-forward@openssh.com", text("/run/x")) == Kind::cancel_socket);
  CHECK(kind("no-more-sessions@openssh.com", "") == Kind::no_more_sessions);
  CHECK(kind("hostkeys-prove-00@openssh.com", text("a key") + text("another")) == Kind::prove_host_keys);
  CHECK(kind("hostkeys-prove-00@openssh.com", text("a key") + u32(7) + "cut") == Kind::other);
  std::string many;
  for (std::size_t i = 0; i < GlobalRequest::most_keys; i++) many += text("a key");
  CHECK(kind("hostkeys-prove-00@openssh.com", many) == Kind::prove_host_keys);
  CHECK(kind("hostkeys-prove-00@openssh.com", many + text("one more")) == Kind::other);
  CHECK(kind("keepalive@openssh.com", "") == Kind::other);
  CHECK_FALSE(read_global_request(text("keepalive@openssh.com")));
}
