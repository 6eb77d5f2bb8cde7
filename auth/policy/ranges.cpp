#include "auth/policy/ranges.h"

#include <arpa/inet.h>

#include <array>

namespace postern::auth::policy {
namespace {

using Number = unsigned __int128;

Number number_of(const Address& a) {
  Number n = 0;
  for (std::size_t i = 0; i < (a.v4() ? 4 : 16); i++) n = n << 8 | a.bytes()[i];
  return n;
}

/// inet_ntop and back: an Address can only be made from text or the kernel's form.
Address address_of(Number n, bool v4) {
  std::array<std::uint8_t, 16> bytes{};
  for (std::size_t i = v4 ? 4 : 16; i-- > 0; n >>= 8) bytes[i] = static_cast<std::uint8_t>(n & 0xff);
  char text[INET6_ADDRSTRLEN];
  ::inet_ntop(v4 ? AF_INET : AF_INET6, bytes.data(), text, sizeof text);
  return Address::parse(text).value_or(Address{});
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
  for (const auto& [first, last] : other.v4_) remove(v4_, first, last);
  for (const auto& [first, last] : other.v6_) remove(v6_, first, last);
}

std::vector<Prefix> AddressRanges::prefixes() const {
  std::vector<Prefix> out;
  for (const bool v4 : {true, false}) {
    const unsigned bits = v4 ? 32 : 128;
    for (const auto& [begin, last] : v4 ? v4_ : v6_) {
      for (Number first = begin;;) {
        // The largest block that begins at `first` and ends by `last`.
        unsigned free = 0;
        while (free < bits && (first >> free & 1) == 0) {
          const unsigned wider = free + 1;
          const Number mask = wider >= 128 ? ~Number{0} : (Number{1} << wider) - 1;
          if (mask > last - first) break;
          free = wider;
        }
        out.push_back(Prefix{address_of(first, v4), bits - free});
        const Number mask = free >= 128 ? ~Number{0} : (Number{1} << free) - 1;
        if (last - first <= mask) break;
        first += mask + 1;
      }
    }
  }
  return out;
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
