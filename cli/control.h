#pragma once

#include "base/expected.h"

#include <nlohmann/json.hpp>

#include <string>

namespace postern::cli {

/// One request to posternd's control socket at `path`, and its answer, an object. Errors: the socket's (errno), or what posternd answered.
Expected<nlohmann::json> ask(const std::string& path, const nlohmann::json& request);

/// The same, the answer as posternd wrote it, in one line (posternd's own "error" is an error here as well).
Expected<std::string> ask_text(const std::string& path, const nlohmann::json& request);

}  // namespace postern::cli
