#pragma once

#include "base/poller.h"
#include "base/unique_fd.h"
#include "sshd/net/libssh_ext.h"

#include <libssh/callbacks.h>

#include <cstdint>
#include <string>
#include <utility>

namespace postern::sshd::net {

/// One forwarding: a socket that postern-session gave us and a channel of the client's, bytes both ways, each way closed on its own.
///
/// No buffer of ours but what libssh did not take of one read: the client's window and the socket's queue hold the rest. What the socket does
/// not take stays in libssh, whose window then holds the client (as SessionChannel). Callbacks only note; the connection frees.
class ForwardChannel {
 public:
  /// The client asks for it (direct-tcpip, direct-streamlocal): no socket yet.
  ForwardChannel(std::uint32_t number, ext::ChannelOpen open, Poller& poller) : number_{number}, open_{std::move(open)}, poller_{poller} {}
  ~ForwardChannel();
  ForwardChannel(const ForwardChannel&) = delete;
  ForwardChannel& operator=(const ForwardChannel&) = delete;

  std::uint32_t number() const { return number_; }
  const ext::ChannelOpen& open_request() const { return open_; }
  ssh_channel handle() const { return handle_; }
  /// `handle`: just confirmed to the client, or (`confirmed` false) asked of it.
  void opened(ssh_session session, ssh_channel handle, UniqueFd socket, bool confirmed);
  /// The client's answer, where it was asked.
  void answered(bool success);

  /// Is there something that a turn could do? `may_send`: libssh takes bytes now (the same for every channel).
  bool needs_turn(bool may_send) const;
  /// Moves at most `most` bytes to the client (0: libssh takes none now), and what there is to the socket. True when bytes went to the client.
  bool turn(std::size_t most);
  void update_watch(bool may_send);
  /// Ends it now: closes the socket and the channel.
  void abort();
  /// Bytes of the client's that the socket does not take.
  std::size_t kept() const;
  /// The socket is closed and our CLOSE is out (or the client refused it).
  bool finished() const { return finished_; }
  /// Nothing of it is left at the client either: it may be freed.
  bool gone() const { return finished_ && (client_closed_ || refused_); }
  bool take_moved() { return std::exchange(moved_, false); }
  bool told = false;  ///< session knows that it is finished
  std::uint64_t from_client() const { return from_client_; }
  std::uint64_t to_client() const { return to_client_; }

 private:
  std::size_t take(const char* bytes, std::size_t size);
  void write_backlog();
  bool write_some(const char*& bytes, std::size_t& size);
  void end_input();
  bool read_socket(std::size_t most);
  bool send_or_keep(const char* bytes, std::size_t size);
  void finish();
  static int on_data(ssh_session, ssh_channel, void* data, std::uint32_t length, int is_error, void* self);
  static void on_eof(ssh_session, ssh_channel, void* self);
  static void on_close(ssh_session, ssh_channel, void* self);

  const std::uint32_t number_;
  const ext::ChannelOpen open_;
  Poller& poller_;
  ssh_channel handle_ = nullptr;
  ssh_channel_callbacks_struct callbacks_{};
  UniqueFd socket_;
  std::string unsent_;          // read from the socket, not taken by libssh (a key exchange began)
  std::string unwritten_;       // taken out of libssh, not by the socket
  short watched_ = 0;
  bool confirmed_ = false;      // the client said yes
  bool refused_ = false;
  bool readable_ = false;       // poll(2) said so, and nobody has read since
  bool writable_ = false;
  bool touched_ = false;        // a callback noted something since the last turn
  bool backlog_ = false;        // libssh holds bytes for the socket
  bool client_eof_ = false, client_closed_ = false;
  bool input_over_ = false;     // nothing goes to the socket any more: shut down, or it takes no more
  bool output_over_ = false;    // end of file came from the socket
  bool eof_sent_ = false;
  bool finished_ = false;
  bool moved_ = false;
  std::uint64_t from_client_ = 0, to_client_ = 0;
};

}  // namespace postern::sshd::net
