#include "base/id.h"
#include "base/log.h"
#include "catch.h"

#include <set>

using namespace postern;

TEST_CASE("an id's text gives the id back", "[base][id]") {
  std::set<std::string> seen;
  for (int i = 0; i < 1000; i++) {
    const auto id = Id::random();
    const auto text = id.text();
    REQUIRE(text.size() == 26);
    REQUIRE(text.find_first_not_of("abcdefghijklmnopqrstuvwxyz234567") == std::string::npos);
    REQUIRE(Id::parse(text));
    REQUIRE(*Id::parse(text) == id);
    seen.insert(text);
  }
  CHECK(seen.size() == 1000);
  Id id;
  CHECK(id.text() == std::string(26, 'a'));
  id.bytes.fill(0xff);
  CHECK(id.text() == std::string(25, '7') + "4");
}

TEST_CASE("one id has one text: everything else is refused", "[base][id]") {
  const std::string zero(26, 'a');
  CHECK(Id::parse(zero));
  for (const char last : {'b', 'c', 'd', 'f'}) CHECK_FALSE(Id::parse(zero.substr(0, 25) + last));  // spare bits set
  CHECK(Id::parse(zero.substr(0, 25) + 'e'));
  for (const std::string& bad : {std::string{}, zero.substr(1), zero + "a", "A" + zero.substr(1), "1" + zero.substr(1), "=" + zero.substr(1),
                                 "/" + zero.substr(1), std::string(1, '\0') + zero.substr(1)})
    CHECK_FALSE(Id::parse(bad));
}

TEST_CASE("a stranger's text is one harmless field of a log line", "[base][log]") {
  CHECK(safe_quoted("plain text") == "\"plain text\"");
  CHECK(safe_quoted("a\"b\\c\n\x1b[0m\x7f\xff") == "\"a\\\"b\\\\c\\x0a\\x1b[0m\\x7f\\xff\"");
  CHECK(safe_quoted("abcdef", 3) == "\"abc\"...");
  CHECK(safe_quoted("") == "\"\"");
}
