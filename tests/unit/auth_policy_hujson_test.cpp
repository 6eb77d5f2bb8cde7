#include "auth/policy/hujson.h"
#include "catch.h"

using namespace postern::auth::policy::hujson;

namespace {

/// The first problem of `text`, as "line:column: message"; empty when it is fine.
std::string problem_of(std::string_view text) {
  Problems problems{"f"};
  const auto value = parse(text, problems);
  const auto all = problems.take();
  if (all.empty()) {
    REQUIRE(value);
    return "";
  }
  return std::to_string(all[0].place.line) + ":" + std::to_string(all[0].place.column) + ": " + all[0].message;
}

Value parsed(std::string_view text) {
  Problems problems{"f"};
  auto value = parse(text, problems);
  for (const auto& p : problems.take()) FAIL(p.text());
  return std::move(*value);
}

}  // namespace

TEST_CASE("comments and trailing commas are read, and every value keeps its place", "[auth][policy][hujson]") {
  const auto v = parsed("// head\n{\n  \"a\": [1, /* two */ \"x\",], // tail\r\n\t\"b\": {\"c\": null,},\n}\n/* end */ // more");
  REQUIRE(v.kind == Kind::object);
  CHECK(v.line == 2);
  CHECK(v.column == 1);
  REQUIRE(v.members.size() == 2);
  const auto* a = v.find("a");
  REQUIRE(a);
  CHECK((a->line == 3 && a->column == 3));
  REQUIRE(a->value.items.size() == 2);
  CHECK((a->value.items[1].line == 3 && a->value.items[1].column == 22));
  CHECK(a->value.items[1].text == "x");
  const auto* b = v.find("b");
  REQUIRE(b);
  CHECK((b->line == 4 && b->column == 2));
  CHECK(b->value.find("c")->value.kind == Kind::null);
  CHECK(v.find("z") == nullptr);
}

TEST_CASE("numbers, words and escapes are those of RFC 8259", "[auth][policy][hujson]") {
  for (const char* good : {"0", "-0", "10", "1.5", "1e9", "-1.25E-3", "true", "false", "null", "[]", "{}", "\"\"", " [ ] "}) CHECK(problem_of(good) == "");
  for (const char* bad : {"01", "-", "+1", ".5", "1.", "1e", "tru", "True", "nulls", "nan", "'x'", "1 2", "", "// only a comment", "\v1"})
    CHECK(problem_of(bad) != "");
  CHECK(parsed(R"("\u0041\t\"\\\/\b\f\n\r \u00e9\ud83d\udeaa")").text == "A\t\"\\/\b\f\n\r \xc3\xa9\xf0\x9f\x9a\xaa");
  for (const char* bad : {R"("\x")", R"("\u12")", R"("\ud83d")", R"("\udeaa")", R"("\ud83dA")", R"("\ud83d\u0041")", R"("\u0000")", R"("\)"})
    CHECK(problem_of(bad) != "");
}

TEST_CASE("commas stand between values, and at most one after the last", "[auth][policy][hujson]") {
  for (const char* bad : {"[,]", "[1,,]", "[1 2]", "{,}", "{\"a\":1,,}", "{\"a\" 1}", "{\"a\":}", "{a:1}", "{\"a\":1 \"b\":2}", "[1}", "{\"a\":1]"})
    CHECK(problem_of(bad) != "");
  CHECK(problem_of("{\"a\": 1\n \"b\": 2}") == "2:2: expected a comma or \"}\" here");
}

TEST_CASE("a file that ends too early says what is not closed", "[auth][policy][hujson]") {
  CHECK(problem_of("{\n \"ssh\": [\n  {\"a\": 1},") == "2:9: this \"[\" is not closed");
  CHECK(problem_of("{\n \"ssh\": 1") == "1:1: this \"{\" is not closed");
  CHECK(problem_of("{\n \"ss") == "2:2: this string does not end");
  CHECK(problem_of("{\n \"a\":") == "2:6: the file ends where a value should be");
  CHECK(problem_of("{ /* never\n closed }") == "1:3: this comment does not end");
  const std::string whole = "{\"groups\": {\"group:a\": [\"x@y\"]}, /* c */ \"ssh\": [{\"action\": \"accept\", \"n\": -1.5e3, \"t\": true,}],}";
  REQUIRE(problem_of(whole) == "");
  for (std::size_t n = 0; n < whole.size(); n++) {
    INFO(whole.substr(0, n));
    CHECK(problem_of(whole.substr(0, n)) != "");
  }
}

TEST_CASE("equal names in one object are refused, all of them, however they are spelt", "[auth][policy][hujson]") {
  Problems problems{"f"};
  parse("{\"ssh\": 1,\n \"s\\u0073h\": 2,\n \"a\": {\"b\": 1, \"b\": 2}, \"c\": {\"b\": 1}}", problems);
  const auto all = problems.take();
  REQUIRE(all.size() == 2);
  CHECK(all[0].text() == "f:2:2: the name \"ssh\" appears twice in this object (first in line 1; merge the two)");
  CHECK((all[1].place.line == 3 && all[1].place.column == 16));
}

TEST_CASE("a hundred levels of nesting are read, more are refused, 100,000 as well", "[auth][policy][hujson]") {
  const auto nested = [](std::size_t n) { return std::string(n, '[') + std::string(n, ']'); };
  CHECK(problem_of(nested(max_nesting)) == "");
  CHECK(problem_of(nested(max_nesting + 1)) == "1:101: nested too deeply");
  CHECK(problem_of(nested(100'000)) == "1:101: nested too deeply");
  std::string objects;
  for (int i = 0; i < 100'000; i++) objects += "{\"a\":";
  CHECK(problem_of(objects).find("nested too deeply") != std::string::npos);
}

TEST_CASE("bytes that no text editor writes are refused at their place", "[auth][policy][hujson]") {
  using namespace std::string_literals;
  CHECK(problem_of("{\n\0}"s) == "2:1: NUL byte in the file");
  CHECK(problem_of("{\n \"a\": \"\xff\"}") == "2:8: the file is not UTF-8 here");
  for (const char* bad : {"\xc0\xaf", "\xe0\x80\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xf8\x88\x80\x80\x80", "\x80", "\xe2\x82", "\xc3"})
    CHECK(problem_of("\""s + bad + "\"") == "1:2: the file is not UTF-8 here");
  CHECK(problem_of("// \xff\n{}") == "1:4: the file is not UTF-8 here");
  CHECK(problem_of("\"a\tb\"") == "1:3: control character in a string");
  CHECK(problem_of("\"a\x7f\"") == "1:3: control character in a string");
  CHECK(problem_of("{} // \x1b[2J") == "1:7: control character in a comment");
  CHECK(problem_of("\"a\nb\"") == "1:1: this string does not end in its line");
  CHECK(problem_of("\xef\xbb\xbf{}") == "1:1: the file begins with a byte order mark");
  CHECK(parsed("\"\xd9\x85\xd8\xb3\"").text == "\xd9\x85\xd8\xb3");
}

TEST_CASE("a file over 16 MiB is refused before it is read, one just under it is read", "[auth][policy][hujson]") {
  CHECK(problem_of(std::string(max_file_bytes + 1, ' ')) == "1:1: the file is too large: 16777217 bytes");
  std::string big = "[";
  big += std::string(max_file_bytes - 2, ' ');
  big += "]";
  CHECK(problem_of(big) == "");
  std::string many = "[";
  while (many.size() < max_file_bytes - 10) many += "0,";
  many += "0]";
  CHECK(problem_of(many).find("too many values") != std::string::npos);
}
