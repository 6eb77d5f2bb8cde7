#include "recorder/cast/chain.h"

#include <sodium.h>

#include <algorithm>
#include <cstring>
#include <exception>

namespace postern::recorder::cast {
namespace {

constexpr std::string_view domain = "postern-cast-v1";

crypto_generichash_blake2b_state* as_state(std::array<unsigned char, 384>& state) {
  static_assert(sizeof(crypto_generichash_blake2b_state) <= 384);
  return reinterpret_cast<crypto_generichash_blake2b_state*>(state.data());
}

}  // namespace

Chain::Chain(const std::array<std::uint8_t, 16>& recording_id) {
  // Without it libsodium hashes with its portable code (half as fast); more calls do nothing.
  if (sodium_init() < 0) std::terminate();
  crypto_generichash_blake2b_init(as_state(state_), nullptr, 0, border_.size());
  crypto_generichash_blake2b_update(as_state(state_), reinterpret_cast<const unsigned char*>(domain.data()), domain.size());
  crypto_generichash_blake2b_update(as_state(state_), recording_id.data(), recording_id.size());
  crypto_generichash_blake2b_final(as_state(state_), border_.data(), border_.size());
  open_block();
}

void Chain::open_block() {
  std::array<unsigned char, 8> start;
  for (unsigned i = 0; i < 8; i++) start[i] = static_cast<unsigned char>(offset_ >> (8 * i));
  crypto_generichash_blake2b_init(as_state(state_), nullptr, 0, border_.size());
  crypto_generichash_blake2b_update(as_state(state_), border_.data(), border_.size());
  crypto_generichash_blake2b_update(as_state(state_), start.data(), start.size());
}

void Chain::update(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const std::size_t room = block_size - static_cast<std::size_t>(offset_ % block_size);
    const std::size_t n = std::min(room, bytes.size());
    crypto_generichash_blake2b_update(as_state(state_), reinterpret_cast<const unsigned char*>(bytes.data()), n);
    offset_ += n;
    bytes = bytes.subspan(n);
    if (n == room) {
      crypto_generichash_blake2b_final(as_state(state_), border_.data(), border_.size());
      open_block();
    }
  }
}

Digest Chain::head() const {
  if (offset_ % block_size == 0) return border_;
  alignas(64) auto copy = state_;
  Digest digest;
  crypto_generichash_blake2b_final(as_state(copy), digest.data(), digest.size());
  return digest;
}

std::string hex(const Digest& digest) {
  constexpr char digits[] = "0123456789abcdef";
  std::string out;
  out.reserve(digest.size() * 2);
  for (const auto b : digest) {
    out += digits[b >> 4];
    out += digits[b & 15];
  }
  return out;
}

}  // namespace postern::recorder::cast
