#pragma once

#include "base/address.h"
#include "base/expected.h"

#include <chrono>
#include <cstdint>
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
  /// `nft`: the program; killed when it takes longer than `timeout`. `mark`: a file, gone with the next boot as the table is, that stands as long as
  /// there may be one: it tells a run with other settings of the table that a killed one left.
  Takeover(std::string nft, std::chrono::milliseconds timeout, std::string mark);

  /// These and no others, in one transaction; none: the table goes. A table that an earlier run left is replaced, or goes. Blocks for nft's some 10 ms, at most
  /// the time-out; does nothing when nothing changed.
  Expected<Done> set(const std::vector<Redirect>& redirects);

  /// What nft is told. Pure.
  static std::string script(const std::vector<Redirect>& redirects);

 private:
  std::string nft_;
  std::chrono::milliseconds timeout_;
  std::string mark_;
  bool left_ = false;  // by an earlier run
  std::vector<Redirect> redirects_;
};

}  // namespace postern::sshd::broker
