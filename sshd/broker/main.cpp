// posternd: the broker.
//
// Runs as root. Accepts connections, asks the identity provider who is there, decides by the policy, signs with the host keys, and
// remembers who is in. Never parses an SSH byte: postern-net does, in its sandbox, and what it says is taken as a stranger's word.
#include "auth/policy/hujson.h"
#include "base/daemon.h"
#include "base/log.h"
#include "sshd/broker/broker.h"
#include "sshd/broker/session_rules.h"

#include "libssh_text.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>

#include <sys/resource.h>
#include <unistd.h>

#include <linux/close_range.h>
#include <csignal>
#include <filesystem>
#include <iostream>

namespace {

using postern::Place;
using postern::Problem;

int print_problems(const std::vector<Problem>& problems) {
  for (const auto& p : problems) std::cerr << p.text() << "\n";
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  using namespace postern;
  using namespace postern::sshd::broker;

  const auto read = read_daemon_options(argc, argv, "posternd: an SSH server for identity networks", "/etc/postern/posternd.toml", "docs/SETTINGS.md",
                                        "posternd " POSTERN_VERSION " (" POSTERN_LIBSSH_TEXT ")");
  if (const int* status = std::get_if<int>(&read)) return *status;
  const auto& options = std::get<DaemonOptions>(read);
  // What we were started with is nobody else's business: programs that we start get what they are given.
  ::close_range(3, ~0U, CLOSE_RANGE_CLOEXEC);

  const auto text = read_whole_file(options.config, 1024 * 1024);
  if (!text) {
    std::cerr << text.error().doing << "\n";
    return 1;
  }
  auto config = parse_config(*text, options.config);
  if (!config) return print_problems(config.error());
  if (options.check) {
    std::vector<Problem> problems;
    boost::asio::io_context unused;
    const auto provider = make_provider(unused, *config);
    const bool known = provider && config->identity.provider == "static";  // the others ask a daemon, which is not ours to ask now
    if (!provider) {
      problems = provider.error();
    } else if (known) {
      // Of one node, and its logins are denied: the others need not wait for it.
      for (const auto& node : (*provider)->network().nodes)
        if (const auto rules = effective_rules({}, node, *config); !rules)
          std::cerr << "warning: " << config->identity.file << ": node " << safe_quoted(node.name) << " cannot log in: " << rules.error().doing << "\n";
    }
    if (config->policy.has(PolicySource::file)) {
      const auto policy_text = read_whole_file(config->policy.file, auth::policy::hujson::max_file_bytes);
      if (!policy_text) {
        problems.push_back({{config->policy.file, 1, 1}, "", policy_text.error().doing, ""});
      } else if (auto policy = auth::policy::Policy::load(*policy_text, config->policy.file, load_options(*config)); !policy) {
        problems.insert(problems.end(), policy.error().begin(), policy.error().end());
      } else {
        for (const auto& w : policy->warnings()) std::cerr << "warning: " << w.text() << "\n";
        if (known) problems = policy->run_tests((*provider)->network(), false).failed;
      }
    }
    if (!problems.empty()) return print_problems(problems);
    std::cout << options.config << ": fine\n";
    return 0;
  }

  set_up_log("posternd", config->log.level);
  std::signal(SIGPIPE, SIG_IGN);
  // Each connection costs four descriptors here.
  rlimit files{};
  if (::getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur < files.rlim_max) {
    Zygote::set_child_file_limit(files);
    files.rlim_cur = files.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &files);
  }
  std::error_code ec;
  const auto self = std::filesystem::read_symlink("/proc/self/exe", ec);
  boost::asio::io_context io{1};
  Broker broker{io, std::move(*config), options.config, self.parent_path().string()};
  int result = 0;

  boost::asio::signal_set stop_signals{io, SIGTERM, SIGINT};
  stop_signals.async_wait([&](boost::system::error_code e, int) {
    if (e) return;
    spdlog::info("event=stopping");
    notify_systemd("STOPPING=1");
    broker.stop();
    io.stop();
  });
  boost::asio::signal_set hup{io, SIGHUP};
  std::function<void()> wait_hup = [&] {
    hup.async_wait([&](boost::system::error_code e, int) {
      if (e) return;
      broker.reload();
      wait_hup();
    });
  };
  wait_hup();

  broker.start([&](Expected<Done> started) {
    if (!started) {
      std::cerr << started.error().doing << "\n";
      result = 1;
      return io.stop();
    }
    spdlog::info("event=ready");
    std::vector<std::string> listening;
    for (const auto& e : broker.listening()) listening.push_back(e.text());
    tell_ready(options.ready_fd, listening, {{"control", broker.config().control.socket}});
  });
  io.run();
  return result;
}
