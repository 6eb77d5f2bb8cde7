#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

struct crypto_generichash_blake2b_state;

namespace postern::recorder::cast {

using Digest = std::array<std::uint8_t, 32>;

/// The chain over a recording's bytes: blocks of 64 KiB by offset, so that its borders follow from the offset alone and every
/// reader finds the same.
///
///     head(0)     = BLAKE2b-256("postern-cast-v1" || recording id (16 bytes))
///     head(end of block k) = BLAKE2b-256(head(start of block k) || le64(start of block k) || the block's bytes)
///     head(n) inside a block = the same over the block's bytes up to n
///
/// So head(n) names exactly the first n bytes. Two copies agree up to n if and only if their head(n) are equal.
class Chain {
 public:
  static constexpr std::size_t block_size = 64 * 1024;

  explicit Chain(const std::array<std::uint8_t, 16>& recording_id);
  /// The next bytes of the stream.
  void update(std::span<const std::byte> bytes);
  std::uint64_t offset() const noexcept { return offset_; }
  /// Of all bytes so far. Does not end the chain.
  Digest head() const;

 private:
  void open_block();

  std::uint64_t offset_ = 0;
  Digest border_{};  // head at the start of the current block
  alignas(64) std::array<unsigned char, 384> state_{};  // crypto_generichash_blake2b_state (libsodium), of the current block
};

std::string hex(const Digest& digest);

}  // namespace postern::recorder::cast
