#pragma once

#include "base/expected.h"
#include "sshd/protocol/net.h"

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/thread_pool.hpp>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace postern::sshd::broker {

/// The server's host keys. They never leave posternd: postern-net gets the public halves and asks for signatures.
///
/// Kept as PKCS#8 PEM, mode 0600, in a folder of mode 0700: ssh_host_ed25519.pem, ssh_host_ecdsa.pem (P-256), ssh_host_rsa.pem
/// (3072 bits), made at the first start, each written whole (temporary name, fsync, rename).
class HostKeys {
 public:
  /// Errors name the file. A folder or file that others may write is refused.
  static Expected<std::unique_ptr<HostKeys>> load_or_make(const std::string& dir);
  ~HostKeys();

  std::size_t count() const noexcept;
  /// SSH wire form (RFC 4253 section 6.6, RFC 8709, RFC 5656).
  const std::string& public_blob(std::size_t key) const;
  /// "ssh-ed25519 AAAA..." as in a known_hosts file, without host name.
  std::string public_line(std::size_t key) const;
  /// "SHA256:..." as ssh-keygen -l shows it.
  std::string fingerprint(std::size_t key) const;

  using Done = std::function<void(std::string signature_blob)>;  ///< empty = refused
  /// Signs what may_sign() allows. ed25519 and ecdsa at once, rsa in a thread of its own (about 2 ms) whose queue is bounded:
  /// beyond max_rsa_queue the answer is a refusal. `done` runs on `executor`.
  void sign(const net::AskSign& ask, boost::asio::any_io_executor executor, Done done);

  static constexpr int max_rsa_queue = 64;

  /// True for exactly 32, 48 or 64 bytes that do not begin with "SSHSIG": an exchange hash, never a signed file (PROTOCOL.sshsig)
  /// nor anything that the recording key signs (that is another key).
  static bool may_sign(std::string_view data) noexcept;

 private:
  struct Key;
  HostKeys();
  std::vector<Key> keys_;
  std::unique_ptr<boost::asio::thread_pool> rsa_;
  std::shared_ptr<std::atomic<int>> rsa_waiting_;
};

}  // namespace postern::sshd::broker
