#include "catch.h"

#include "base/file_watch.h"
#include "temp_dir.h"

#include <filesystem>
#include <fstream>

using namespace postern;
using namespace std::chrono_literals;
namespace fs = std::filesystem;

namespace {
struct Scene {
  void write(const fs::path& file, const std::string& text) { std::ofstream{file} << text; }
  /// Until `changes` is `wanted`; then as long again as a change may take to be told.
  int run(int wanted) {
    io.restart();
    for (const auto end = std::chrono::steady_clock::now() + 10s; changes < wanted && std::chrono::steady_clock::now() < end;) io.run_one_for(100ms);
    io.run_for(200ms);
    return changes;
  }
  const TempDir folder;
  const fs::path dir = folder.path;
  boost::asio::io_context io;
  int changes = 0;
};
}  // namespace

TEST_CASE("a file that is written, replaced, removed or made again is noticed, and its neighbours are not", "[broker][watch]") {
  Scene s;
  s.write(s.dir / "policy", "one");
  FileWatch watch{s.io, s.dir / "policy", [&] { s.changes++; }};
  s.write(s.dir / "policy", "two, in place");
  CHECK(s.run(1) == 1);
  s.write(s.dir / "new", "three");
  fs::rename(s.dir / "new", s.dir / "policy");
  CHECK(s.run(2) == 2);
  for (int i = 0; i < 10; i++) s.write(s.dir / ("other" + std::to_string(i)), "x");
  CHECK(s.run(2) == 2);
  fs::remove(s.dir / "policy");
  CHECK(s.run(3) == 3);
  s.write(s.dir / "policy", "again");
  CHECK(s.run(4) == 4);
}

TEST_CASE("a file whose folder is replaced as a whole, or made again, is noticed", "[broker][watch]") {
  Scene s;
  const fs::path folder = s.dir / "postern", next = s.dir / "postern.new";
  fs::create_directory(folder);
  s.write(folder / "policy", "one");
  FileWatch watch{s.io, folder / "policy", [&] { s.changes++; }};
  fs::create_directory(next);
  s.write(next / "policy", "another");
  fs::rename(folder, s.dir / "postern.old");
  fs::rename(next, folder);
  CHECK(s.run(1) == 1);
  s.write(folder / "policy", "written in the new folder");
  CHECK(s.run(2) == 2);
  fs::remove_all(folder);
  CHECK(s.run(3) == 3);
  fs::create_directory(folder);
  CHECK(s.run(3) == 3);
  s.write(folder / "policy", "again");
  CHECK(s.run(4) == 4);
}

TEST_CASE("a file of the same size that is set back in time is noticed", "[broker][watch]") {
  Scene s;
  s.write(s.dir / "policy", "one");
  const auto time = fs::last_write_time(s.dir / "policy");
  FileWatch watch{s.io, s.dir / "policy", [&] { s.changes++; }};
  s.write(s.dir / "policy", "two");
  fs::last_write_time(s.dir / "policy", time);
  CHECK(s.run(1) == 1);
}

TEST_CASE("a file behind links that Kubernetes turns is noticed each time", "[broker][watch]") {
  Scene s;
  for (const char* version : {"v1", "v2", "v3"}) {
    fs::create_directory(s.dir / version);
    s.write(s.dir / version / "policy", version);
  }
  fs::create_symlink("v1", s.dir / "..data");
  fs::create_symlink("..data/policy", s.dir / "policy");
  FileWatch watch{s.io, s.dir / "policy", [&] { s.changes++; }};
  int turns = 0;
  for (const char* version : {"v2", "v3", "v1"}) {
    fs::create_symlink(version, s.dir / "..tmp");
    fs::rename(s.dir / "..tmp", s.dir / "..data");
    turns++;
    CHECK(s.run(turns) == turns);
  }
  s.write(s.dir / "v1" / "policy", "in place, behind the link");
  CHECK(s.run(4) == 4);
}

TEST_CASE("a link that is turned anywhere on the way to the file is noticed", "[base][watch]") {
  Scene s;
  for (const char* version : {"v1", "v2"}) {
    fs::create_directories(s.dir / "data" / "releases" / version / "config");
    s.write(s.dir / "data" / "releases" / version / "config" / "policy", version);
  }
  fs::create_directory(s.dir / "srv");
  fs::create_symlink("../data/releases/v1", s.dir / "srv" / "current");
  fs::create_symlink(s.dir / "srv" / "current" / "config", s.dir / "etc");
  FileWatch watch{s.io, s.dir / "etc" / "policy", [&] { s.changes++; }};
  CHECK(s.run(0) == 0);
  fs::create_symlink("../data/releases/v2", s.dir / "srv" / "next");
  fs::rename(s.dir / "srv" / "next", s.dir / "srv" / "current");
  CHECK(s.run(1) == 1);
  s.write(s.dir / "data" / "releases" / "v2" / "config" / "policy", "in place");
  CHECK(s.run(2) == 2);
}

TEST_CASE("a folder that is replaced as a whole is noticed where it holds a link to the file", "[base][watch]") {
  Scene s;
  for (const char* name : {"one", "two"}) s.write(s.dir / name, name);
  for (const char* folder : {"postern", "postern.new"}) fs::create_directory(s.dir / folder);
  fs::create_directories(s.dir / "data" / "files");  // whose parent is not that of the folder that is replaced
  for (const char* name : {"one", "two"}) fs::rename(s.dir / name, s.dir / "data" / "files" / name);
  fs::create_symlink(s.dir / "data" / "files" / "one", s.dir / "postern" / "policy");
  fs::create_symlink(s.dir / "data" / "files" / "two", s.dir / "postern.new" / "policy");
  FileWatch watch{s.io, s.dir / "postern" / "policy", [&] { s.changes++; }};
  CHECK(s.run(0) == 0);
  fs::rename(s.dir / "postern", s.dir / "postern.old");
  fs::rename(s.dir / "postern.new", s.dir / "postern");
  CHECK(s.run(1) == 1);
}
