#pragma once

#include "base/address.h"

#include <cstddef>
#include <map>
#include <optional>
#include <string_view>

namespace postern::auth::policy {

/// A set of addresses of both families, made by adding and removing ranges (ipsets: tailscale.com/kb/1387/ipsets).
class AddressRanges {
 public:
  void add(const Address& first, const Address& last);
  void remove(const Address& first, const Address& last);
  void add(const Prefix& prefix);
  void remove(const Prefix& prefix);
  void add(const AddressRanges& other);
  void remove(const AddressRanges& other);
  bool contains(const Address& address) const noexcept;
  bool empty() const noexcept { return v4_.empty() && v6_.empty(); }
  std::size_t size() const noexcept { return v4_.size() + v6_.size(); }  ///< ranges that do not touch each other

 private:
  using Number = unsigned __int128;
  using Set = std::map<Number, Number>;  // first -> last; never touching each other
  static void add(Set& set, Number first, Number last);
  static void remove(Set& set, Number first, Number last);
  Set v4_, v6_;
};

/// "10.0.0.1-10.0.0.9", both ends in it; absent when it is no range of one family.
std::optional<AddressRanges> parse_address_range(std::string_view text);

}  // namespace postern::auth::policy
