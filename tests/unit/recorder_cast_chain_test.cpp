#include "catch.h"

#include "recorder/cast/chain.h"

#include <sodium.h>

#include <random>
#include <vector>

using namespace postern::recorder::cast;

namespace {

std::vector<std::byte> some_bytes(std::size_t n) {
  std::mt19937 random{7};
  std::vector<std::byte> bytes(n);
  for (auto& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

// The definition in chain.h, word by word, in one go.
Digest by_definition(const std::array<std::uint8_t, 16>& id, const std::vector<std::byte>& bytes) {
  Digest head;
  std::string first = "postern-cast-v1" + std::string{id.begin(), id.end()};
  crypto_generichash(head.data(), 32, reinterpret_cast<const unsigned char*>(first.data()), first.size(), nullptr, 0);
  for (std::uint64_t at = 0; at < bytes.size(); at += 65536) {
    std::string block{head.begin(), head.end()};
    for (int i = 0; i < 8; i++) block += static_cast<char>(at >> (8 * i));
    const auto n = std::min<std::size_t>(65536, bytes.size() - at);
    block.append(reinterpret_cast<const char*>(bytes.data()) + at, n);
    crypto_generichash(head.data(), 32, reinterpret_cast<const unsigned char*>(block.data()), block.size(), nullptr, 0);
  }
  return head;
}

}  // namespace

TEST_CASE("the chain's head follows from the bytes alone, however they came", "[cast][chain]") {
  const std::array<std::uint8_t, 16> id{1, 2, 3};
  for (const std::size_t n : {0UL, 1UL, 65535UL, 65536UL, 65537UL, 131072UL, 300001UL}) {
    const auto bytes = some_bytes(n);
    const Digest expected = by_definition(id, bytes);
    for (const std::size_t step : {1UL, 1000UL, 65536UL, 1000000UL}) {
      if (step == 1 && n > 70000) continue;
      Chain chain{id};
      for (std::size_t at = 0; at < n; at += step) {
        chain.update(std::span{bytes}.subspan(at, std::min(step, n - at)));
        (void)chain.head();  // asking does not end it
      }
      CHECK(chain.offset() == n);
      CHECK(hex(chain.head()) == hex(expected));
    }
  }
}

TEST_CASE("a changed byte, another length or another recording has another head", "[cast][chain]") {
  const std::array<std::uint8_t, 16> id{1}, other{2};
  auto bytes = some_bytes(100000);
  const auto head = by_definition(id, bytes);
  Chain longer{id}, elsewhere{other}, changed{id};
  longer.update(bytes);
  longer.update(std::span{bytes}.first(1));
  elsewhere.update(bytes);
  bytes[17] ^= std::byte{1};
  changed.update(bytes);
  CHECK(longer.head() != head);
  CHECK(elsewhere.head() != head);
  CHECK(changed.head() != head);
}
