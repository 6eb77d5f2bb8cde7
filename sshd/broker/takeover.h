#pragma once

#include "base/address.h"
#include "base/expected.h"
#include "base/unique_fd.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/steady_timer.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace postern::sshd::broker {

/// Setting listen.takeover = "nft": a port that another server has on all addresses is ours on some, by destination NAT in a table of our own.
/// Peers' addresses stay what they are. Connections that this host itself makes do not pass there (they are in no PREROUTING, nft(8)) and
/// reach the other server.
class Takeover {
 public:
  static constexpr const char* table = "postern_takeover";
  struct Redirect {
    Endpoint dialled;
    std::uint16_t to = 0;  ///< our port, on the same address
    bool operator==(const Redirect&) const = default;
  };
  /// Each rule of the table, as the kernel writes it (nfnetlink); none where there is no table. Never blocks.
  using Rules = std::function<Expected<std::vector<std::string>>()>;
  static Expected<std::vector<std::string>> rules_in_kernel();
  /// `nft`: the program; killed when it takes longer than `timeout`. `mark`: a file, gone with the next boot as the table is, that stands as long as
  /// there may be one: it tells a run with other settings of the table that a killed one left.
  Takeover(std::string nft, std::chrono::milliseconds timeout, std::string mark, Rules rules = rules_in_kernel);

  /// These and no others, in one transaction; none: the table goes. A table that an earlier run left is replaced, or goes. Blocks for nft's some 10 ms, at most
  /// the time-out; does nothing when nothing changed.
  Expected<Done> set(const std::vector<Redirect>& redirects);

  /// Whether the table still is as set() left it, or why that cannot be said. It is not after `nft flush ruleset`, with which Debian's /etc/nftables.conf
  /// begins; then the next set() does it again. Never blocks. While a set() that failed is to be tried again there is nothing to lose.
  Expected<bool> stands();

  /// What nft is told. Pure.
  static std::string script(const std::vector<Redirect>& redirects);

 private:
  std::string nft_;
  std::chrono::milliseconds timeout_;
  std::string mark_;
  bool left_ = false;  // by an earlier run
  std::vector<Redirect> redirects_;
  Rules rules_;
  std::vector<std::string> as_set_;  // rules_, after set()
};

/// Tells that something in this network namespace's nftables changed, whoever did it and whatever it was: soon after the first change, once for many.
class RulesetWatch {
 public:
  /// The kernel's notices (netlink(7), NFNLGRP_NFTABLES). Not read: only that there are some counts, as it does when some were lost.
  static Expected<UniqueFd> notices();
  RulesetWatch(boost::asio::io_context& io, UniqueFd notices, std::function<void()> changed);
  /// Calls nothing any more. Also from within `changed`.
  ~RulesetWatch();
  RulesetWatch(const RulesetWatch&) = delete;
  RulesetWatch& operator=(const RulesetWatch&) = delete;

 private:
  void wait();

  boost::asio::posix::stream_descriptor notices_;
  boost::asio::steady_timer pause_;
  std::function<void()> changed_;
  std::chrono::steady_clock::time_point last_{};
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
};

}  // namespace postern::sshd::broker
