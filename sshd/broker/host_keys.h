#pragma once

#include "base/expected.h"
#include "sshd/protocol/net.h"

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/thread_pool.hpp>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace postern::sshd::broker {

/// The server's host keys. They never leave posternd: postern-net gets the public halves and asks for signatures.
///
/// From a folder of ours: PKCS#8 PEM, mode 0600, in a folder of mode 0700: ssh_host_ed25519.pem, ssh_host_ecdsa.pem (P-256), ssh_host_rsa.pem
/// (3072 bits), made at the first start, each written whole (temporary name, fsync, rename). Beside them, while keys are being rotated,
/// NAME.next.pem (clients learn them, OpenSSH PROTOCOL 2.5) and afterwards NAME.old.pem (connections that began with them may rekey).
/// Or from files of the administrator's, as sshd's (ssh-keygen's own format or PEM, without passphrase): ed25519, RSA of at least 2048 bits, ECDSA.
class HostKeys {
 public:
  /// Errors name the file. A folder or file that others may write is refused.
  static Expected<std::unique_ptr<HostKeys>> load_or_make(const std::string& dir);
  /// The first of each type is offered in key exchanges; of the others clients learn. Two that are the same key are refused.
  static Expected<std::unique_ptr<HostKeys>> load(const std::vector<std::string>& files);
  /// Makes what is missing of the keys to come. Load again afterwards.
  static Expected<Done> prepare_rotation(const std::string& dir);
  /// The keys to come become the keys, these the old ones, whose predecessors go. ENOENT: nothing is prepared. Load again afterwards.
  static Expected<Done> finish_rotation(const std::string& dir);
  ~HostKeys();

  enum class Use { offered, announced, retired };
  std::size_t count() const noexcept;
  Use use(std::size_t key) const;
  std::string path(std::size_t key) const;
  /// SSH wire form (RFC 4253 section 6.6, RFC 8709, RFC 5656).
  const std::string& public_blob(std::size_t key) const;
  /// "ssh-ed25519 AAAA..." as in a known_hosts file, without host name.
  std::string public_line(std::size_t key) const;
  /// "SHA256:..." as ssh-keygen -l shows it.
  std::string fingerprint(std::size_t key) const;
  /// As ssh-keygen -l shows it: 256 for ed25519.
  int bits(std::size_t key) const;

  using OnSigned = std::function<void(std::string signature_blob)>;  ///< empty = refused
  /// Signs what may_sign() allows, or the proof of possession for the connection whose first exchange hash is `session_id` (empty: none). ed25519 and ecdsa at once, rsa in a thread of its own
  /// (about 2 ms): those who are logged in first, then in the order in which they asked, unless `asker` has gone meanwhile. Who asks is bounded by the
  /// limits on connections, and a refusal would end another one's login or session. `done` runs on `executor`.
  void sign(const net::AskSign& ask, std::string_view session_id, boost::asio::any_io_executor executor, std::weak_ptr<const void> asker, OnSigned done);

  /// True for exactly 32, 48 or 64 bytes that do not begin with "SSHSIG": an exchange hash, never a signed file (PROTOCOL.sshsig)
  /// nor anything that the recording key signs (that is another key).
  static bool may_sign(std::string_view data) noexcept;

 private:
  struct Key;
  HostKeys();
  Expected<Done> add(const std::string& path, Use use);
  const Key* find(std::uint32_t id) const;
  std::vector<Key> keys_;
  std::unique_ptr<boost::asio::thread_pool> rsa_;
  struct RsaQueue;
  std::shared_ptr<RsaQueue> rsa_waiting_;
};

}  // namespace postern::sshd::broker
