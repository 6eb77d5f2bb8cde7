#include "catch.h"
#include "sshd/broker/audit.h"

#include <nlohmann/json.hpp>

#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

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

TEST_CASE("a full disk in the middle of an audit line costs that event and no other", "[sshd][audit]") {
  char name[] = "/tmp/postern-audit-XXXXXX";
  const int fd = ::mkstemp(name);
  REQUIRE(fd >= 0);
  ::close(fd);
  postern::sshd::broker::Config::Audit settings;
  settings.file = name;
  settings.journal_socket.clear();
  settings.auditd = false;
  {
    Audit audit{settings};
    REQUIRE(audit.open());
    audit.tell("first", {{"why", "fits"}});
    // A limit of this process stands for the disk's (setrlimit(2)): the kernel takes what fits, then refuses.
    rlimit before{};
    ::getrlimit(RLIMIT_FSIZE, &before);
    const auto was = ::signal(SIGXFSZ, SIG_IGN);
    const rlimit tight{static_cast<rlim_t>(std::ifstream{name, std::ios::ate}.tellg()) + 20, before.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &tight);
    audit.tell("second", {{"why", "finds room for 20 bytes"}});
    audit.tell("third", {{"why", "finds none"}});
    ::setrlimit(RLIMIT_FSIZE, &before);
    ::signal(SIGXFSZ, was);
    audit.tell("fourth", {{"why", "fits again"}});
    audit.tell("fifth", {});
  }
  std::vector<std::string> events;
  int broken = 0;
  std::ifstream in{name};
  for (std::string line; std::getline(in, line);) {
    const auto read = nlohmann::json::parse(line, nullptr, false);
    if (read.is_discarded())
      broken++;
    else
      events.push_back(read.at("event"));
  }
  ::unlink(name);
  CHECK(events == std::vector<std::string>{"first", "fourth", "fifth"});
  CHECK(broken == 1);
}
