#include "catch.h"

#include "cli/report.h"

using namespace postern;
using namespace postern::cli;

namespace {

/// What stands above the caret in with_caret()'s two lines, as far as it goes; a caret elsewhere is an empty text.
std::string pointed_at(const std::string& lines) {
  const auto end = lines.find('\n');
  const std::string shown = lines.substr(0, end), under = lines.substr(end + 1);
  const auto caret = columns_of(under.substr(0, under.find('^')));
  std::size_t at = 0;
  while (at < shown.size() && columns_of(shown.substr(0, at)) < caret)
    do at++;
    while (at < shown.size() && (static_cast<unsigned char>(shown[at]) & 0xc0) == 0x80);
  return shown.substr(at);
}

}  // namespace

TEST_CASE("the caret stands under the byte that is named", "[cli][report]") {
  CHECK(with_caret("  \"action\": \"deny\",", 13) == "    \"action\": \"deny\",\n              ^\n");
  CHECK(with_caret("abc", 1) == "    abc\n    ^\n");
  CHECK(with_caret("abc", 4) == "    abc\n       ^\n");   // the end of the line
  CHECK(with_caret("abc", 99) == "    abc\n       ^\n");  // beyond it
  CHECK(with_caret("", 1) == "    \n    ^\n");
  CHECK(with_caret("    x", 2) == "       x\n    ^\n");  // within the indentation
}

TEST_CASE("tabs and other scripts do not move the caret", "[cli][report]") {
  CHECK(with_caret("\t\"a\":\t\"x\"", 7) == "    \"a\":    \"x\"\n            ^\n");
  const std::string umlauts = "\"größe\": \"x\"";
  CHECK(with_caret(umlauts, static_cast<unsigned>(umlauts.find("\"x\"")) + 1) == "    \"größe\": \"x\"\n             ^\n");
  const std::string wide = "[\"漢字\", x";  // two columns each
  CHECK(with_caret(wide, static_cast<unsigned>(wide.find('x')) + 1) == "    [\"漢字\", x\n             ^\n");
  const std::string hebrew = "\"שלום\": x";
  CHECK(pointed_at(with_caret(hebrew, static_cast<unsigned>(hebrew.find('x')) + 1)) == "x");
}

TEST_CASE("nothing in a file steers the terminal that shows it", "[cli][report]") {
  CHECK(printable("a\x1b]0;owned\x07\x7f\r\n\tb") == "a\\x1b]0;owned\\x07\\x7f\\x0d\\x0a\\x09b");
  CHECK(printable("a\xc2\x9b" "31m") == "a\\u{9b}31m");              // CSI as C1
  CHECK(printable("a\xe2\x80\xae" "b") == "a\\u{202e}b");            // right-to-left override
  CHECK(printable("a\xe2\x80\x8b" "b") == "a\\u{200b}b");            // zero width space
  CHECK(printable("a\xff\xc3") == "a\\xff\\xc3");
  CHECK(printable(std::string_view{"\0", 1}) == "\\x00");
  CHECK(printable("größe 漢字 مستخدم") == "größe 漢字 مستخدم");
  const std::string line = "\x1b[31m \xff\xc2\x9b x";
  CHECK(pointed_at(with_caret(line, static_cast<unsigned>(line.find('x')) + 1)) == "x");
}

TEST_CASE("a long line is cut around the caret", "[cli][report]") {
  const std::string noise(5000, 'n');
  const std::string far = with_caret(noise + "HERE" + noise, 5001);
  CHECK(far.size() < 300);
  CHECK(pointed_at(far).rfind("HEREnnn", 0) == 0);
  CHECK(far.rfind("    ...n", 0) == 0);
  CHECK(far.find("n...\n") != std::string::npos);
  CHECK(pointed_at(with_caret("HERE" + noise, 1)).rfind("HEREnnn", 0) == 0);
  const std::string at_the_end = with_caret(noise + "HERE", 5001);
  CHECK(pointed_at(at_the_end) == "HERE");
  std::string wide;
  for (int i = 0; i < 1000; i++) wide += "漢";
  CHECK(pointed_at(with_caret(wide + "HERE", 3001)) == "HERE");
  CHECK(pointed_at(with_caret(std::string(1000, '\xff') + "HERE", 1001)) == "HERE");
  CHECK(pointed_at(with_caret(std::string(1000, '\t') + "HERE", 1001)) == "HERE");
  const std::string just_fits(100, 'x');
  CHECK(with_caret("\t\t" + just_fits, 102) == "    " + just_fits + "\n    " + std::string(99, ' ') + "^\n");
  CHECK(with_caret(std::string(16 * 1024 * 1024, '['), 101).size() < 300);
}

TEST_CASE("a report names place, field, message and hint, as a compiler does", "[cli][report]") {
  const std::string text = "{\n  \"ssh\": 5,\r\n}\n";
  const Lines lines{text};
  CHECK(lines.at(2) == "  \"ssh\": 5,");
  CHECK(lines.at(4) == "");
  CHECK(lines.at(99) == "");
  CHECK(report({{"p.hujson", 2, 10}, "ssh", "must be an array", "write [ ]"}, Severity::error, lines) ==
        "p.hujson:2:10: error: ssh: must be an array\n    \"ssh\": 5,\n           ^\n  hint: write [ ]\n");
  CHECK(report({{"p.hujson", 1, 1}, "", "all well\x1b", ""}, Severity::warning, lines) == "p.hujson:1:1: warning: all well\\x1b\n    {\n    ^\n");
  CHECK(report({{"p.hujson", 0, 0}, "", "No such file", ""}, Severity::error, Lines{""}) == "p.hujson: error: No such file\n");
}
