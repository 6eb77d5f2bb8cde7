#include "auth/policy/ranges.h"

#include <algorithm>
#include <iterator>

namespace postern::auth::policy {
namespace {

using Number = unsigned __int128;

Number number_of(const Address& a) {
  Number n = 0;
  for (std::size_t i = 0; i < (a.v4() ? 4 : 16); i++) n = n << 8 | a.bytes()[i];
  return n;
}

Number last_of(const Prefix& p) {
  const unsigned free = (p.address.v4() ? 32 : 128) - p.length;
  const Number mask = free == 128 ? ~Number{0} : (Number{1} << free) - 1;
  return number_of(p.address) | mask;
}
Number first_of(const Prefix& p) {
  const unsigned free = (p.address.v4() ? 32 : 128) - p.length;
  const Number mask = free == 128 ? ~Number{0} : (Number{1} << free) - 1;
  return number_of(p.address) & ~mask;
}

}  // namespace

void AddressRanges::add(Set& set, Number first, Number last) {
  // Everything that overlaps or touches becomes one.
  auto it = set.upper_bound(first);
  if (it != set.begin()) {
    const auto before = std::prev(it);
    if (before->second >= first || before->second + 1 == first) it = before;
  }
  while (it != set.end() && (it->first <= last || it->first == last + 1)) {
    first = std::min(first, it->first);
    last = std::max(last, it->second);
    it = set.erase(it);
  }
  set.emplace(first, last);
}

void AddressRanges::remove(Set& set, Number first, Number last) {
  auto it = set.upper_bound(first);
  if (it != set.begin() && std::prev(it)->second >= first) --it;
  while (it != set.end() && it->first <= last) {
    const auto [from, to] = *it;
    it = set.erase(it);
    if (from < first) set.emplace(from, first - 1);
    if (to > last) set.emplace(last + 1, to);
  }
}

void AddressRanges::add(const Address& first, const Address& last) { add(first.v4() ? v4_ : v6_, number_of(first), number_of(last)); }
void AddressRanges::remove(const Address& first, const Address& last) { remove(first.v4() ? v4_ : v6_, number_of(first), number_of(last)); }
void AddressRanges::add(const Prefix& p) { add(p.address.v4() ? v4_ : v6_, first_of(p), last_of(p)); }
void AddressRanges::remove(const Prefix& p) { remove(p.address.v4() ? v4_ : v6_, first_of(p), last_of(p)); }

void AddressRanges::add(const AddressRanges& other) {
  for (const auto& [first, last] : other.v4_) add(v4_, first, last);
  for (const auto& [first, last] : other.v6_) add(v6_, first, last);
}
void AddressRanges::remove(const AddressRanges& other) {
  if (&other == this) {
    v4_.clear();
    v6_.clear();
    return;
  }
  for (const auto& [first, last] : other.v4_) remove(v4_, first, last);
  for (const auto& [first, last] : other.v6_) remove(v6_, first, last);
}

bool AddressRanges::contains(const Address& address) const noexcept {
  const Set& set = address.v4() ? v4_ : v6_;
  const Number n = number_of(address);
  const auto after = set.upper_bound(n);
  return after != set.begin() && std::prev(after)->second >= n;
}

std::optional<AddressRanges> parse_address_range(std::string_view text) {
  const auto dash = text.find('-');
  if (dash == std::string_view::npos) return std::nullopt;
  const auto first = Address::parse(text.substr(0, dash)), last = Address::parse(text.substr(dash + 1));
  if (!first || !last || first->v4() != last->v4() || *last < *first) return std::nullopt;
  AddressRanges out;
  out.add(*first, *last);
  return out;
}

}  // namespace postern::auth::policy
