#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

struct sockaddr_storage;

namespace postern {

/// An IP address as the kernel or a file gives it. IPv4-mapped IPv6 (::ffff:100.64.0.1) becomes IPv4 at once, so one peer has one form.
class Address {
 public:
  Address() = default;
  /// Numeric only (inet_pton(3)): no names, no zone, no brackets.
  static std::optional<Address> parse(std::string_view text);
  static std::optional<Address> from(const sockaddr_storage& address);

  bool v4() const noexcept { return v4_; }
  /// Network order; IPv4 uses the first 4 bytes.
  const std::array<std::uint8_t, 16>& bytes() const noexcept { return bytes_; }
  /// 0.0.0.0 or ::, which stand for any address of this machine.
  bool is_unspecified() const noexcept { return bytes_ == std::array<std::uint8_t, 16>{}; }
  std::string text() const;
  auto operator<=>(const Address&) const = default;  ///< IPv4 before IPv6, then numerically

 private:
  bool v6_first_ = false;  // sorts IPv4 before IPv6: false < true
  bool v4_ = true;
  std::array<std::uint8_t, 16> bytes_{};
};

/// "100.64.0.0/10", "fd7a::/48", or a bare address (its whole length).
struct Prefix {
  Address address;
  unsigned length = 0;

  static std::optional<Prefix> parse(std::string_view text);
  bool contains(const Address& a) const noexcept;
  std::string text() const;
  bool operator==(const Prefix&) const = default;
};

/// "127.0.0.2:2222", "[::1]:22", "127.0.0.2" (port = `default_port`).
struct Endpoint {
  Address address;
  std::uint16_t port = 0;

  static std::optional<Endpoint> parse(std::string_view text, std::uint16_t default_port);
  std::string text() const;
  auto operator<=>(const Endpoint&) const = default;
};

}  // namespace postern
