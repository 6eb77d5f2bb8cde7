#include "base/address.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <charconv>
#include <cstring>

namespace postern {
namespace {

std::optional<unsigned> number(std::string_view text, unsigned most) {
  unsigned value = 0;
  if (text.empty() || (text.size() > 1 && text[0] == '0')) return std::nullopt;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value > most) return std::nullopt;
  return value;
}

}  // namespace

std::optional<Address> Address::parse(std::string_view text) {
  if (text.empty() || text.size() > 45 || text.find('\0') != std::string_view::npos) return std::nullopt;
  const std::string z{text};
  sockaddr_storage s{};
  auto& v4 = reinterpret_cast<sockaddr_in&>(s);
  auto& v6 = reinterpret_cast<sockaddr_in6&>(s);
  if (::inet_pton(AF_INET, z.c_str(), &v4.sin_addr) == 1) {
    s.ss_family = AF_INET;
  } else if (::inet_pton(AF_INET6, z.c_str(), &v6.sin6_addr) == 1) {
    s.ss_family = AF_INET6;
  } else {
    return std::nullopt;
  }
  return from(s);
}

std::optional<Address> Address::from(const sockaddr_storage& address) {
  Address a;
  if (address.ss_family == AF_INET) {
    std::memcpy(a.bytes_.data(), &reinterpret_cast<const sockaddr_in&>(address).sin_addr, 4);
    return a;
  }
  if (address.ss_family != AF_INET6) return std::nullopt;
  const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address).sin6_addr;
  if (IN6_IS_ADDR_V4MAPPED(&v6)) {
    std::memcpy(a.bytes_.data(), v6.s6_addr + 12, 4);
    return a;
  }
  a.v6_first_ = true;
  a.v4_ = false;
  std::memcpy(a.bytes_.data(), v6.s6_addr, 16);
  return a;
}

std::string Address::text() const {
  char out[INET6_ADDRSTRLEN] = {};
  ::inet_ntop(v4_ ? AF_INET : AF_INET6, bytes_.data(), out, sizeof out);
  return out;
}

std::optional<Prefix> Prefix::parse(std::string_view text) {
  const auto slash = text.find('/');
  const auto address = Address::parse(text.substr(0, slash));
  if (!address) return std::nullopt;
  const unsigned whole = address->v4() ? 32 : 128;
  if (slash == std::string_view::npos) return Prefix{*address, whole};
  const auto length = number(text.substr(slash + 1), whole);
  if (!length) return std::nullopt;
  return Prefix{*address, *length};
}

bool Prefix::contains(const Address& a) const noexcept {
  if (a.v4() != address.v4()) return false;
  const unsigned whole = length / 8, rest = length % 8;
  if (std::memcmp(a.bytes().data(), address.bytes().data(), whole) != 0) return false;
  if (rest == 0) return true;
  const auto mask = static_cast<std::uint8_t>(0xff << (8 - rest));
  return (a.bytes()[whole] & mask) == (address.bytes()[whole] & mask);
}

std::string Prefix::text() const { return address.text() + "/" + std::to_string(length); }

std::optional<Endpoint> Endpoint::parse(std::string_view text, std::uint16_t default_port) {
  std::string_view host = text, port;
  if (!text.empty() && text.front() == '[') {
    const auto close = text.find(']');
    if (close == std::string_view::npos) return std::nullopt;
    host = text.substr(1, close - 1);
    if (close + 1 < text.size()) {
      if (text[close + 1] != ':') return std::nullopt;
      port = text.substr(close + 2);
      if (port.empty()) return std::nullopt;
    }
  } else if (const auto colon = text.find(':'); colon != std::string_view::npos && text.find(':', colon + 1) == std::string_view::npos) {
    host = text.substr(0, colon);
    port = text.substr(colon + 1);
    if (port.empty()) return std::nullopt;
  }
  const auto address = Address::parse(host);
  if (!address) return std::nullopt;
  if (port.empty()) return Endpoint{*address, default_port};
  const auto value = number(port, 65535);
  if (!value) return std::nullopt;
  return Endpoint{*address, static_cast<std::uint16_t>(*value)};
}

std::string Endpoint::text() const {
  return (address.v4() ? address.text() : "[" + address.text() + "]") + ":" + std::to_string(port);
}

}  // namespace postern
