#pragma once

#include "base/address.h"
#include "base/node.h"

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>

namespace postern::sshd::broker {

/// Whom a connection counts for, before its login and in `Penalties`: the node, whichever of its addresses it comes from; for a stranger the
/// address, of IPv6 the /64, which is what one machine or household gets and may choose freely from (RFC 6177).
std::string source_of(const Node* node, const Address& peer);

/// What a client did before it was let in.
enum class Offence {
  auth_failed,    ///< asked, and the answer was no
  no_auth,        ///< went, or broke the protocol, before it had asked; or nobody knows it
  key_scan,       ///< a node that went when it had seen the host key, as ssh-keyscan(1) does
  grace_exceeded  ///< stayed for the whole grace time and never asked
};
const char* name_of(Offence offence);

/// How long which source is refused. OpenSSH's PerSourcePenalties (sshd_config(5), 9.8; srclimit.c): each offence adds its time, what was added
/// runs down by itself, and only a source with `min` of it is refused, until it has run down, so that who mistypes a name twice is not.
///
/// Pure: no clock, no log. Holds at most `sources`; when it is full, the one that is nearest its end makes room.
class Penalties {
 public:
  using Clock = std::chrono::steady_clock;
  struct Terms {
    std::chrono::milliseconds auth_failed{5000}, no_auth{1000}, key_scan{100}, grace_exceeded{10'000};
    std::chrono::milliseconds min{15'000}, max{600'000};
    std::size_t sources = 65'536;
  };
  explicit Penalties(Terms terms) : terms_{terms} {}

  bool refused(const std::string& source, Clock::time_point now) const;
  /// How long the source is refused from now on, when this offence is the one that made it so.
  std::optional<std::chrono::milliseconds> add(const std::string& source, Offence offence, Clock::time_point now);
  /// Refused from now on, whatever `min` and `max` say, and for no shorter than it was.
  void refuse(const std::string& source, std::chrono::milliseconds duration, Clock::time_point now);
  /// A login: what led to it was no attack, so what was added so far is forgotten, but for a refusal that stands.
  void forgive(const std::string& source);
  std::size_t size() const { return entries_.size(); }

 private:
  struct Entry {
    Clock::time_point expires{};
    bool refused = false;
  };
  std::chrono::milliseconds penalty_for(Offence offence) const;
  /// Nothing when `expires` is not in the future, or no source may be kept.
  Entry* keep_until(const std::string& source, Clock::time_point expires, Clock::time_point now);
  void forget(Clock::time_point now);

  Terms terms_;
  std::unordered_map<std::string, Entry> entries_;
  std::set<std::pair<Clock::time_point, std::string>> by_end_;
};

/// Lines that a stranger causes must not fill the disk: `burst` at once, then `per_second`; the next line tells how many were left out.
class LogLimit {
 public:
  using Clock = std::chrono::steady_clock;
  LogLimit(double burst, double per_second) : burst_{burst}, per_second_{per_second}, tokens_{burst} {}
  /// How many were left out since the last line, when this one may be written.
  std::optional<std::uint64_t> pass(Clock::time_point now);

 private:
  double burst_, per_second_, tokens_;
  Clock::time_point refilled_{};
  std::uint64_t left_out_ = 0;
};

}  // namespace postern::sshd::broker
