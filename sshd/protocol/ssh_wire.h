#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

/// The types of RFC 4251 section 5, as packets, host keys and ssh-keygen's files have them.
namespace postern::sshd {

/// Reads them in order, bounds-checked, without a copy: what it gives lives as long as the bytes. After the first that is not there ok() is false, and
/// all that follows is empty or 0.
class WireView {
 public:
  explicit WireView(std::string_view bytes) : left_{bytes} {}
  bool ok() const { return ok_; }
  bool at_end() const { return left_.empty(); }
  std::uint8_t u8() {
    const std::string_view bytes = take(1);
    return bytes.empty() ? 0 : static_cast<std::uint8_t>(bytes[0]);
  }
  std::uint32_t u32() {
    std::uint32_t value = 0;
    for (const char byte : take(4)) value = value << 8 | static_cast<unsigned char>(byte);
    return value;
  }
  std::string_view text() { return take(u32()); }

 private:
  std::string_view take(std::size_t size) {
    if (!ok_ || size > left_.size()) {
      ok_ = false;
      return {};
    }
    const std::string_view taken = left_.substr(0, size);
    left_.remove_prefix(size);
    return taken;
  }

  std::string_view left_;
  bool ok_ = true;
};

inline void put_u32(std::string& out, std::size_t n) {
  for (int shift = 24; shift >= 0; shift -= 8) out += static_cast<char>(n >> shift & 0xff);
}
inline void put_string(std::string& out, std::string_view text) {
  put_u32(out, text.size());
  out += text;
}

}  // namespace postern::sshd
