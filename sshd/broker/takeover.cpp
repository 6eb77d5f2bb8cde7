#include "sshd/broker/takeover.h"

#include "base/unique_fd.h"

#include <fcntl.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netlink.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

namespace postern::sshd::broker {
namespace {

using error_code = boost::system::error_code;

/// A firewall's reload is one transaction or several: they are looked at together. Who changes rules all the time costs us one look a second, and who
/// removes ours all the time one nft.
constexpr std::chrono::milliseconds look_after{100}, look_pause{1'000};

/// Its complaint, or nothing.
Expected<Done> run(const std::string& program, const std::string& input, std::chrono::milliseconds timeout) {
  const UniqueFd in{::memfd_create("nft", MFD_CLOEXEC)}, err{::memfd_create("nft-errors", MFD_CLOEXEC)};
  if (!in || !err || ::write(in.get(), input.data(), input.size()) != static_cast<ssize_t>(input.size()) || ::lseek(in.get(), 0, SEEK_SET) != 0)
    return Unexpected{system_error("run " + program)};
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, in.get(), 0);
  ::posix_spawn_file_actions_adddup2(&actions, err.get(), 1);
  ::posix_spawn_file_actions_adddup2(&actions, err.get(), 2);
  std::string name = program, dash_f = "-f", dash = "-", path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin";
  char* arguments[] = {name.data(), dash_f.data(), dash.data(), nullptr};
  char* environment[] = {path.data(), nullptr};
  pid_t pid = -1;
  const int error = ::posix_spawn(&pid, program.c_str(), &actions, nullptr, arguments, environment);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return Unexpected{system_error("run " + program, error)};
  const UniqueFd pidfd{static_cast<int>(::syscall(SYS_pidfd_open, pid, 0))};
  pollfd p{pidfd.get(), POLLIN, 0};
  const bool ended = pidfd && ::poll(&p, 1, static_cast<int>(timeout.count())) == 1;
  if (!ended) ::kill(pid, SIGKILL);
  int status = 0;
  if (::waitpid(pid, &status, 0) != pid) return Unexpected{system_error("wait for " + program)};
  if (ended && WIFEXITED(status) && WEXITSTATUS(status) == 0) return Done{};
  std::string said(1000, '\0');
  const ssize_t n = ::pread(err.get(), said.data(), said.size(), 0);
  said.resize(n > 0 ? static_cast<std::size_t>(n) : 0);
  return Unexpected{Error{EIO, program + ": " + (ended ? said : "did not end in " + std::to_string(timeout.count()) + " ms")}};
}

/// One dump of the table's rules. EINTR: they changed meanwhile.
Expected<std::vector<std::string>> dump_rules() {
  const std::string doing = std::string{"ask the kernel for table "} + Takeover::table;
  const UniqueFd fd{::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER)};
  constexpr std::string_view table{Takeover::table};
  struct Question {
    nlmsghdr head{};
    nfgenmsg family{};
    nlattr name{};
    std::array<char, NLA_ALIGN(table.size() + 1)> text{};
  } question;
  question.head = {.nlmsg_len = sizeof question, .nlmsg_type = (NFNL_SUBSYS_NFTABLES << 8) | NFT_MSG_GETRULE, .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP, .nlmsg_seq = 1, .nlmsg_pid = 0};
  question.family = {.nfgen_family = NFPROTO_INET, .version = NFNETLINK_V0, .res_id = 0};
  question.name = {.nla_len = static_cast<std::uint16_t>(NLA_HDRLEN + table.size() + 1), .nla_type = NFTA_RULE_TABLE};
  std::copy(table.begin(), table.end(), question.text.begin());
  if (!fd || ::send(fd.get(), &question, sizeof question, 0) != static_cast<ssize_t>(sizeof question)) return Unexpected{system_error(doing)};
  std::vector<std::string> rules;
  std::vector<char> buffer(64 * 1024);
  for (;;) {
    sockaddr_nl from{};
    socklen_t from_size = sizeof from;
    // The kernel fills the socket as it is asked, and again as it is read (netlink_dump()): there is nothing to wait for.
    const ssize_t n = ::recvfrom(fd.get(), buffer.data(), buffer.size(), MSG_DONTWAIT | MSG_TRUNC, reinterpret_cast<sockaddr*>(&from), &from_size);
    if (n < 0) return Unexpected{system_error(doing)};
    if (from.nl_pid != 0) continue;
    std::string_view rest{buffer.data(), std::min(static_cast<std::size_t>(n), buffer.size())};
    while (!rest.empty()) {
      nlmsghdr head{};
      if (rest.size() >= sizeof head) std::memcpy(&head, rest.data(), sizeof head);
      if (head.nlmsg_len < sizeof head || head.nlmsg_len > rest.size()) return Unexpected{Error{EBADMSG, doing + ": half a message"}};
      const std::string_view body = rest.substr(sizeof head, head.nlmsg_len - sizeof head);
      rest.remove_prefix(std::min<std::size_t>(NLMSG_ALIGN(head.nlmsg_len), rest.size()));
      if ((head.nlmsg_flags & NLM_F_DUMP_INTR) != 0) return Unexpected{system_error(doing, EINTR)};
      if (head.nlmsg_type == NLMSG_DONE) return rules;
      if (head.nlmsg_type == NLMSG_ERROR) {
        int code = -EBADMSG;
        if (body.size() >= sizeof code) std::memcpy(&code, body.data(), sizeof code);
        return Unexpected{system_error(doing, -code)};
      }
      // nfgenmsg's res_id counts everybody's transactions.
      rules.emplace_back(body.substr(std::min(sizeof(nfgenmsg), body.size())));
    }
  }
}

}  // namespace

Expected<std::vector<std::string>> Takeover::rules_in_kernel() {
  auto rules = dump_rules();
  for (int i = 0; i < 3 && !rules && rules.error().code == EINTR; i++) rules = dump_rules();
  return rules;
}

std::string Takeover::script(const std::vector<Redirect>& redirects) {
  // Made first, so that deleting it never fails: nft has no "if it exists" before 1.0.8.
  std::string text = std::string{"table inet "} + table + "\ndelete table inet " + table + "\n";
  if (redirects.empty()) return text;
  text += std::string{"table inet "} + table + " {\n  chain prerouting {\n    type nat hook prerouting priority dstnat; policy accept;\n";
  for (const auto& r : redirects) {
    const bool v4 = r.dialled.address.v4();
    text += std::string{"    "} + (v4 ? "ip" : "ip6") + " daddr " + r.dialled.address.text() + " tcp dport " + std::to_string(r.dialled.port) + " dnat " + (v4 ? "ip" : "ip6") +
            " to " + Endpoint{r.dialled.address, r.to}.text() + "\n";
  }
  return text + "  }\n}\n";
}

Takeover::Takeover(std::string nft, std::chrono::milliseconds timeout, std::string mark, Rules rules)
    : nft_{std::move(nft)}, timeout_{timeout}, mark_{std::move(mark)}, left_{::access(mark_.c_str(), F_OK) == 0}, rules_{std::move(rules)} {}

Expected<Done> Takeover::set(const std::vector<Redirect>& redirects) {
  if (redirects == redirects_ && !left_) return Done{};
  if (!redirects.empty() && !UniqueFd{::open(mark_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600)}) return Unexpected{system_error("write " + mark_)};
  left_ = true;  // until it is known what there is: an nft that is killed may have done it
  if (auto done = run(nft_, script(redirects), timeout_); !done) return done;
  if (redirects.empty()) ::unlink(mark_.c_str());
  left_ = false;
  redirects_ = redirects;
  as_set_.clear();
  if (auto rules = redirects.empty() ? Expected<std::vector<std::string>>{std::vector<std::string>{}} : rules_()) as_set_ = std::move(*rules);
  return Done{};
}

Expected<bool> Takeover::stands() {
  if (left_ || redirects_.empty()) return true;
  const auto rules = rules_();
  if (!rules) return Unexpected{rules.error()};
  // The number, because they may have gone before as_set_ was asked for.
  left_ = rules->size() != redirects_.size() || *rules != as_set_;
  return !left_;
}

Expected<UniqueFd> RulesetWatch::notices() {
  UniqueFd fd{::socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_NETFILTER)};
  sockaddr_nl all{};
  all.nl_family = AF_NETLINK;
  all.nl_groups = 1u << (NFNLGRP_NFTABLES - 1);
  if (!fd || ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&all), sizeof all) != 0) return Unexpected{system_error("watch the rules of nftables")};
  return fd;
}

RulesetWatch::RulesetWatch(boost::asio::io_context& io, UniqueFd notices, std::function<void()> changed)
    : notices_{io, notices.release()}, pause_{io}, changed_{std::move(changed)} {
  wait();
}

RulesetWatch::~RulesetWatch() { *alive_ = false; }

void RulesetWatch::wait() {
  notices_.async_wait(boost::asio::posix::stream_descriptor::wait_read, [this, alive = alive_](error_code failed) {
    if (failed || !*alive) return;
    pause_.expires_at(std::max(std::chrono::steady_clock::now() + look_after, last_ + look_pause));
    pause_.async_wait([this, alive](error_code ec) {
      if (ec || !*alive) return;
      last_ = std::chrono::steady_clock::now();
      // Emptied first: what comes from now on is another change. Reading tells of lost ones by ENOBUFS, once (netlink(7)).
      char c = 0;
      for (int i = 0; i < 10'000 && (::recv(notices_.native_handle(), &c, 1, MSG_DONTWAIT) >= 0 || errno == ENOBUFS || errno == EINTR); i++) {}
      wait();
      const auto call = changed_;  // it may end us
      call();
    });
  });
}

}  // namespace postern::sshd::broker
