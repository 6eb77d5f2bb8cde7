#pragma once

#include "auth/policy/compiled.h"
#include "auth/policy/hujson.h"
#include "auth/policy/matching.h"
#include "auth/policy/policy.h"
#include "auth/policy/ranges.h"

#include <span>
#include <string>
#include <string_view>
#include <vector>

// What the parts of Policy::load() share: how members are read, how problems are told, what names mean. Internal to the folder.
namespace postern::auth::policy {

/// strings.TrimSpace for ASCII: the real service takes " root" and "\troot" for "root".
std::string_view trimmed(std::string_view text);

/// `text` as JSON would write it, cut at 200 bytes; control characters as \xNN.
std::string json_quoted(std::string_view text);

/// Null, false, [], {} or "": says nothing.
bool is_empty(const hujson::Value& v);

/// Where a name stands: decides what it may be.
enum class Spot { ssh_src, ssh_dst, network_src, network_dst };

class Reading {
 public:
  using Value = hujson::Value;
  using Member = hujson::Member;
  using Kind = hujson::Kind;

  const Value& root;
  hujson::Problems& problems;
  hujson::Problems& warnings;
  const LoadOptions& options;
  Compiled& out;
  StringMap<std::uint32_t> ipsets = {};  ///< their numbers in Compiled::sets
  StringMap<std::uint32_t> posture_numbers = {};
  Postures default_postures = {};

  void problem(const Value& at, std::string field, std::string message, std::string hint = {}) {
    problems.add(at.line, at.column, std::move(field), std::move(message), std::move(hint));
  }
  void problem(const Member& at, std::string field, std::string message, std::string hint = {}) {
    problems.add(at.line, at.column, std::move(field), std::move(message), std::move(hint));
  }
  void wrong_kind(const Value& at, std::string field, std::string_view wanted);

  /// The member of that name, without regard to the case of ASCII letters: the service reads "ACLs", "Action" and "Users" too
  /// (encoding/json of Go; older files and its own documentation have them). Two of one name are a problem of check_members().
  static const Member* find(const Value& object, std::string_view name) noexcept;
  /// A problem for each member of `object` whose name is not in `known`, and for each name that is there twice.
  void check_members(const Value& object, const std::string& field, std::span<const std::string_view> known, std::string_view what);

  struct Text {
    std::string_view text;
    const Value* at;
  };
  /// The strings of an array; null is empty. Problems for anything else.
  std::vector<Text> strings(const Value& value, const std::string& field);
  std::vector<Text> strings(const Value& object, std::string_view name, const std::string& field);

  /// A section of the file, of that kind; nullptr when it is absent, null, or (with a problem) of another.
  const Value* section(std::string_view name, Kind kind);

  /// "posture:x" names of a rule's srcPosture, or of defaultSrcPosture where it has none.
  Postures postures(const Value& rule, const std::string& field);

  /// "node:os": "windows" …; absent when the member is.
  std::optional<std::map<std::string, Attribute>> posture_attributes(const Value& object, const std::string& field);

  /// The protocol of an acl, a grant or a test: its IANA number, 0 for all of them. Absent: there is no such protocol.
  static std::optional<std::uint16_t> protocol(std::string_view name);
  /// "22", "1-1024", "1-1024,22", "*".
  static std::optional<std::vector<PortRange>> port_list(std::string_view text);

  /// What `raw` names at this place; absent, with a problem, when it may not stand there.
  std::optional<Principal> principal(std::string_view raw, const Value& at, Spot spot, const std::string& field, std::size_t index);

  bool has_tag(std::string_view tag) const { return out.tags.find(tag) != out.tags.end(); }
  bool has_group(std::string_view group) const { return out.groups.find(group) != out.groups.end(); }
  /// True when "…:*@domain" may stand for the domain; else a problem has been told, in the service's words.
  bool domain_is_ours(std::string_view domain, const Value& at, std::string field, bool in_ssh_src);
};

/// Sections that say nothing of who may log in: checked for form, and forgotten.
void check_other_sections(Reading& reading);
/// `tests` and `sshTests`.
void read_tests(Reading& reading);

/// A login such as alice@example.com.
inline bool is_login(std::string_view text) { return problem_of_login(text).empty(); }

}  // namespace postern::auth::policy
