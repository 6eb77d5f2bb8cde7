#pragma once

#include <nlohmann/json.hpp>

#include <string>
#include <vector>

namespace postern::cli {

/// A line of a recorder's list (docs/PROTOCOL.recorder.md) and whose it is.
struct Copy {
  std::string recorder;
  nlohmann::json line;
};

/// One list of all copies and of what the relay still has, merged by id, oldest first. Each entry: id, state, where, length,
/// created_ms, copies, header, and gap where there is one.
///
/// state: whole | live | stalled | cut | moved | conflict, of the best copy; "uploading" while the relay still has bytes of an ended
/// recording that a recorder takes; "not on a recorder yet" when none takes it (older parts may be at some); "gap" when there is
/// nothing but a gap. A gap = what no journal took; it stays in the entry whatever the state is.
std::vector<nlohmann::json> merge(const std::vector<Copy>& copies, const std::vector<nlohmann::json>& relay);

}  // namespace postern::cli
