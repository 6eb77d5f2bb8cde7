#include "auth/pam/pam.h"

#include <dlfcn.h>
#include <security/pam_appl.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>

namespace postern::auth::pam {
namespace {

constexpr int deepest_include = 16;  // libpam's own: PAM_SUBSTACK_MAX_LEVEL

struct Reader {
  std::string folder;
  std::vector<std::string> modules;
  std::set<std::string> seen_files;

  bool read(const std::string& service, int depth) {
    if (depth > deepest_include) return false;
    const std::string path = service.starts_with('/') ? service : folder + "/" + service;
    std::ifstream in{path};
    if (!in) return false;
    if (!seen_files.insert(path).second) return true;
    std::string line, whole;
    while (std::getline(in, line)) {
      if (line.ends_with('\\')) {  // pam.conf(5): a line may go on
        whole += line.substr(0, line.size() - 1) + " ";
        continue;
      }
      whole += line;
      one_line(whole, depth);
      whole.clear();
    }
    return true;
  }

  void one_line(std::string text, int depth) {
    if (const auto hash = text.find('#'); hash != std::string::npos) text.resize(hash);
    std::istringstream words{text};
    std::string type, control;
    if (!(words >> type)) return;
    if (type == "@include") {
      if (words >> control) read(control, depth + 1);
      return;
    }
    if (!(words >> control)) return;
    if (control.starts_with('[')) {  // [success=1 default=ignore]
      while (!control.ends_with(']'))
        if (std::string more; words >> more)
          control += " " + more;
        else
          return;
    }
    std::string what;
    if (!(words >> what)) return;
    if (type.starts_with('-')) type.erase(0, 1);
    if (control == "include" || control == "substack") {
      read(what, depth + 1);
      return;
    }
    if (std::find(modules.begin(), modules.end(), what) == modules.end()) modules.push_back(what);
  }
};

std::string module_folder() {
  Dl_info info{};
  if (::dladdr(reinterpret_cast<const void*>(&::pam_strerror), &info) == 0 || info.dli_fname == nullptr) return "/lib/security";
  std::string path = info.dli_fname;  // …/lib/x86_64-linux-gnu/libpam.so.0: modules are in its "security" (Debian, Fedora, SUSE)
  const auto slash = path.rfind('/');
  return (slash == std::string::npos ? std::string{} : path.substr(0, slash)) + "/security";
}

}  // namespace

std::vector<std::string> modules_of(const std::string& service, const std::string& confdir, bool& found) {
  Reader reader;
  reader.folder = confdir.empty() ? "/etc/pam.d" : confdir;
  found = reader.read(service, 0);
  if (!found && confdir.empty()) {
    reader.folder = "/usr/lib/pam.d";  // vendors' place, pam.d(5)
    found = reader.read(service, 0);
    reader.folder = "/etc/pam.d";
  }
  // pam_start(3) loads all of it, whatever phases are asked for later, and "other" too.
  reader.read("other", 0);
  return reader.modules;
}

std::vector<std::string> warm_up(const std::string& service, const std::string& confdir) {
  std::vector<std::string> warnings;
  bool found = false;
  const auto modules = modules_of(service, confdir, found);
  if (!found)
    warnings.push_back("no PAM service \"" + service + "\" in " + (confdir.empty() ? "/etc/pam.d" : confdir) + ": \"other\" is used");
  const std::string folder = module_folder();
  for (const auto& m : modules) {
    const bool path = m.starts_with('/');
    // Kept open for good: libpam's own dlopen then only counts.
    if (::dlopen((path ? m : folder + "/" + m).c_str(), RTLD_NOW) != nullptr) continue;
    if (!path && ::dlopen(("/lib/security/" + m).c_str(), RTLD_NOW) != nullptr) continue;
    warnings.push_back("PAM module " + m + " cannot be loaded");
  }
  return warnings;
}

}  // namespace postern::auth::pam
