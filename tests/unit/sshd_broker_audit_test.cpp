#include "catch.h"
#include "sshd/broker/audit.h"

#include <nlohmann/json.hpp>

using namespace postern::sshd::broker;

TEST_CASE("an audit line is one JSON object, whatever is in its fields", "[sshd][audit]") {
  const std::string line = audit_json("2026-11-26T06:54:00.000001Z", "login", {{"verdict", "deny"}, {"ssh_user", "a\"\n{}\\\x01\xff"}, {"local_user", ""}});
  CHECK(line.find('\n') == std::string::npos);
  const auto read = nlohmann::json::parse(line);
  CHECK(read.at("event") == "login");
  CHECK(read.at("ssh_user") == "a\"\n{}\\\x01\xef\xbf\xbd");
  CHECK_FALSE(read.contains("local_user"));
}

TEST_CASE("a line end in a value does not begin another field of the journal", "[sshd][audit]") {
  const std::string text = audit_journal("login", {{"verdict", "deny"}, {"ssh_user", "a\nPOSTERN_VERDICT=accept"}});
  CHECK(text.find("POSTERN_VERDICT=deny\n") != std::string::npos);
  // The value goes by its length: name, LF, 8 bytes little endian, value, LF.
  const std::string value = "a\nPOSTERN_VERDICT=accept";
  std::string binary = "POSTERN_SSH_USER\n";
  binary += std::string{static_cast<char>(value.size()), 0, 0, 0, 0, 0, 0, 0} + value + "\n";
  CHECK(text.find(binary) != std::string::npos);
  const auto message = text.substr(0, text.find('\n'));
  CHECK(message.rfind("MESSAGE=", 0) == 0);
  CHECK(text.find("PRIORITY=5\n") != std::string::npos);
}
