#pragma once

#include "catch.h"

#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>

namespace postern {

/// A folder of the test's own, gone at its end.
struct TempDir {
  TempDir() {
    std::string name = (std::filesystem::temp_directory_path() / "postern-test-XXXXXX").string();
    REQUIRE(::mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  std::string file(std::string_view name) const { return (path / name).string(); }

  std::filesystem::path path;
};

}  // namespace postern
