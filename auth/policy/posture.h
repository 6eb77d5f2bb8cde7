#pragma once

#include "base/node.h"

#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace postern::auth::policy {

/// One condition of a device posture (tailscale.com/kb/1288/device-posture):
///
///     node:os == 'macos'        node:tsVersion >= '1.40'      node:os IN ['macos', 'linux']     custom:tier NOT IN ['a']
///     node:tsAutoUpdate         custom:owner IS SET           custom:owner NOT SET
///
/// A bare attribute asks for true. `<` and its like compare versions, part by part ("1.9" < "1.40"), or numbers.
struct PostureCondition {
  enum class Operation { equal, not_equal, less, less_equal, greater, greater_equal, in, not_in, is_set, not_set };
  std::string attribute;
  Operation operation = Operation::equal;
  std::vector<Attribute> values;  ///< one, or those of IN

  /// A value that is not known meets nothing but NOT SET, not even `!=`: what is not known does not open a door.
  bool holds(const std::map<std::string, Attribute>& attributes) const;
};

/// A condition, or in `error` what is wrong with `text` ("expected a value after ==").
struct ParsedCondition {
  std::optional<PostureCondition> condition;
  std::string error;
};
ParsedCondition parse_posture_condition(std::string_view text);

/// A posture of the file: all its conditions must hold.
struct Posture {
  std::string name;  ///< "posture:latestMac"
  std::vector<PostureCondition> conditions;

  bool holds(const std::map<std::string, Attribute>& attributes) const;
};

}  // namespace postern::auth::policy
