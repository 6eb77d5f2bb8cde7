#pragma once

#include "base/address.h"
#include "base/expected.h"
#include "base/file.h"
#include "base/node.h"
#include "base/units.h"

#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace postern {

/// A setting's value as it stands in the file.
struct SettingsValue {
  enum class Kind { boolean, number, text, list };
  Kind kind = Kind::text;
  unsigned line = 0, column = 0;
  bool boolean = false;
  std::string text;  ///< a text, or a number as it would be written
  std::vector<SettingsValue> items;
};

/// Reads a daemon's settings (TOML 1.0): strict, and everything that is wrong is told at once, with its place.
///
/// The caller walks the tables it knows; a key or table that nobody asked for is a problem, so a misspelt setting is never ignored.
/// A value that is refused leaves the default. Typical:
///
///     SettingsReader r{text, file};
///     r.table("limits", [&] { r.duration("grace", s.grace, 100ms, 1h); });
///     if (auto problems = r.finish(); !problems.empty()) ...
class SettingsReader {
 public:
  using Milliseconds = std::chrono::milliseconds;

  SettingsReader(std::string_view text, std::string file);
  ~SettingsReader();
  SettingsReader(const SettingsReader&) = delete;
  SettingsReader& operator=(const SettingsReader&) = delete;

  void table(const char* name, const std::function<void()>& members);

  void text(const char* key, std::string& into, bool may_be_empty = false);
  /// Absolute; `socket`: has to fit sockaddr_un (107 bytes, unix(7)).
  void path(const char* key, std::string& into, bool may_be_empty = false, bool socket = false);
  void one_of(const char* key, std::string& into, const std::vector<std::string>& values);
  void flag(const char* key, bool& into);
  template <class Integer>
  void number(const char* key, Integer& into, std::int64_t least, std::int64_t most) {
    if (const auto v = whole_number(key, least, most)) into = static_cast<Integer>(*v);
  }
  template <class Duration>
  void duration(const char* key, Duration& into, Milliseconds least = Milliseconds{1}, Milliseconds most = std::chrono::hours{24 * 3650}) {
    if (const auto v = amount_of_time(key, least, most)) into = std::chrono::duration_cast<Duration>(*v);
  }
  template <class Integer>
  void size(const char* key, Integer& into, std::uint64_t least = 0, std::uint64_t most = std::uint64_t{1} << 53) {
    if (const auto v = amount_of_bytes(key, least, most)) into = static_cast<Integer>(*v);
  }
  /// A numeric address; "" = none.
  void address(const char* key, std::optional<Address>& into);
  /// A list of texts, each turned into a value by `parse` (which returns an optional). `what`, `hint`: "an address", "\"127.0.0.1\"".
  template <class T, class Parse>
  void list(const char* key, std::vector<T>& into, const Parse& parse, const std::string& what, const std::string& hint, bool required = false) {
    const auto texts = text_list(key, hint, required);
    if (!texts) return;
    std::vector<T> values;
    for (std::size_t i = 0; i < texts->size(); i++) {
      if (auto value = parse((*texts)[i])) values.push_back(std::move(*value));
      else refuse_member(key, i, "must be " + what, hint);
    }
    into = std::move(values);
  }
  /// The value just read is well-formed and still wrong.
  void refuse(const char* key, std::string what, std::string hint = {});

  /// A value of any kind, for a reader that another format shares (auth/policy/session_rules.h); nothing when it is not there, or, with
  /// a problem, when it is none that a SettingsValue can be.
  std::optional<SettingsValue> any(const char* key);
  /// What that reader found.
  void refuse(Problem problem);

  /// What is wrong, in file order; empty = everything is fine.
  std::vector<Problem> finish();

 private:
  std::optional<std::int64_t> whole_number(const char* key, std::int64_t least, std::int64_t most);
  std::optional<Milliseconds> amount_of_time(const char* key, Milliseconds least, Milliseconds most);
  std::optional<std::uint64_t> amount_of_bytes(const char* key, std::uint64_t least, std::uint64_t most);
  std::optional<std::vector<std::string>> text_list(const char* key, const std::string& hint, bool required);
  void refuse_member(const char* key, std::size_t index, std::string what, std::string hint);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// All problems, one a line.
std::string text_of(const std::vector<Problem>& problems);

}  // namespace postern
