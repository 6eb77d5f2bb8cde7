#pragma once

#include "base/address.h"

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace postern::sshd {

/// Where forwardings may go: one list a source that limits them; a target has to stand in every list. No list: everywhere.
///
/// The words are those of auth/policy/session_rules.h, already checked there: "host:port", "*:5432", "10.0.0.0/8:*", "[fd7a::1]:8000-8999",
/// "unix:/run/app/*.sock". A name matches what the client wrote, whatever it resolves to (as PermitOpen of sshd_config(5)); an address or
/// prefix matches the address that is connected to (or listened on), whatever the client wrote. Pure.
class ForwardTargets {
 public:
  /// For the sealed facts: words end with \n, lists with \f (words hold no control character).
  static std::string encode(const std::vector<std::vector<std::string>>& lists);
  /// Nothing for what encode() does not make of checked words.
  static std::optional<ForwardTargets> decode(std::string_view text);

  bool limited() const noexcept { return !lists_.empty(); }
  /// Can there be an address for which allows() says yes? To be asked before a name is looked up. Port 0: is there any port?
  bool may_allow(std::string_view host, std::uint16_t port) const;
  bool allows(std::string_view host, const Address& address, std::uint16_t port) const;
  /// `path`: of the socket, without symbolic links in it.
  bool allows_socket(const std::string& path) const;
  /// Is there any socket that every list allows?
  bool may_allow_sockets() const;

 private:
  struct Word {
    bool socket = false;
    bool any_host = false;
    std::optional<Prefix> prefix;
    std::string text;  ///< host name in lower case, or a path with fnmatch(3)'s signs
    std::uint16_t first = 0, last = 0;
    bool has_port(std::uint16_t port) const { return !socket && (port == 0 || (port >= first && port <= last)); }
  };
  template <class Matches>
  bool every_list(const Matches& matches) const;
  static std::optional<Word> read(std::string_view text);
  std::vector<std::vector<Word>> lists_;
};

}  // namespace postern::sshd
