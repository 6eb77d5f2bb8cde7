#pragma once

#include "base/poller.h"
#include "base/unique_fd.h"
#include "sshd/net/libssh_ext.h"
#include "sshd/protocol/channel.h"

#include <libssh/callbacks.h>

#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <utility>

namespace postern::sshd::net {

/// One session channel of the client's: pumps the program's descriptors to and from libssh.
///
/// It decides nothing: what it may do came from postern-session. Rules that keep it correct with libssh (research/libssh.md section 7):
/// one writer to the input descriptor (while a backlog exists the data callback takes nothing and libssh's window holds the client);
/// nothing is read from the program while libssh has unsent bytes or the client's window is closed; callbacks only note, the
/// connection frees channels in its own turn.
class SessionChannel {
 public:
  /// What a turn may read: others on this connection get theirs in between. A megabyte alone, research/libssh.md section 4.2.
  static constexpr std::size_t whole_read = 1024 * 1024;
  static constexpr std::size_t shared_read = 256 * 1024;

  SessionChannel(std::uint32_t number, ext::ChannelOpen open, Poller& poller) : number_{number}, open_{std::move(open)}, poller_{poller} {}
  ~SessionChannel();
  SessionChannel(const SessionChannel&) = delete;
  SessionChannel& operator=(const SessionChannel&) = delete;

  std::uint32_t number() const { return number_; }
  const ext::ChannelOpen& open_request() const { return open_; }
  ssh_channel handle() const { return handle_; }
  /// The session said yes: the client's open was confirmed with this handle. From here on the destructor frees it.
  void opened(ssh_session session, ssh_channel handle);

  /// Requests are answered in the order they came (RFC 4254 section 5.4), whoever answers: `asked` waits for the session, `answered` is known.
  /// `start`: of a shell, exec or subsystem.
  void asked(bool want_reply, bool start = false) { expected_.push_back({want_reply, std::nullopt, start}); }
  void answered(bool want_reply, bool yes);
  void session_answered(bool yes);
  /// Requests whose answers wait for one of the session's.
  std::size_t unanswered() const { return expected_.size(); }

  bool start_asked = false;  ///< a second shell, exec or subsystem is refused, unless the session refused the first
  void started(const channel::Started& how, std::vector<UniqueFd> fds);
  void exited(const channel::Exited& how);
  /// A line for the user on stderr (in a pty, too), before whatever the program says next.
  void show(const std::string& text);

  /// Moves what can be moved. `alone`: no other channel on this connection.
  void turn(bool alone);
  /// Something happened to this channel while libssh worked for another one.
  bool needs_turn() const { return !finished_ && (touched_ || (!rests_.empty() && may_send())); }
  /// Listens to what can be served now. After all channels' turns.
  void update_watches();
  /// Sends what show() could not yet; true when nothing is left.
  bool send_rests();
  /// Every byte, the exit status and our CLOSE are out (or the client closed): the program's descriptors are closed.
  bool finished() const { return finished_; }
  bool client_closed() const { return client_closed_; }
  /// For session, once finished(): why.
  channel::Type how_it_ended() const { return ended_ ? channel::Type::ended : client_eof_ ? channel::Type::closed_after_eof : channel::Type::closed; }
  /// Did bytes of this channel come from the client or go to it since the last call?
  bool take_moved() { return std::exchange(moved_, false); }
  /// The client's stdout is gone (`ssh host yes | head -1`): the program is to get its SIGPIPE. Its stderr is read on, as by sshd
  /// (channels.c chan_rcvd_eow). A terminal has one descriptor for both directions and stays as it is.
  void client_reads_no_more();

 private:
  struct Expected {
    bool want_reply;
    std::optional<bool> result;
    bool start = false;
  };
  struct Output {
    UniqueFd fd;
    bool error = false;    ///< goes to the client's stderr
    bool ended = true;
  };
  struct Rest {
    bool error;
    std::string bytes;
  };
  void send_replies();
  void drain();
  void finish();
  void announce_end();
  bool may_send() const;
  void send_or_keep(const char* bytes, std::size_t size, bool error);
  void read_output(Output& output, std::size_t most);
  void write_input();
  void close_input(bool program_closed);
  void close_output(Output& output);
  std::size_t take(const char* bytes, std::size_t size);
  static int on_data(ssh_session, ssh_channel, void* data, std::uint32_t length, int is_error, void* self);
  static void on_eof(ssh_session, ssh_channel, void* self);
  static void on_close(ssh_session, ssh_channel, void* self);

  const std::uint32_t number_;
  const ext::ChannelOpen open_;
  Poller& poller_;
  ssh_session session_ = nullptr;
  ssh_channel handle_ = nullptr;
  ssh_channel_callbacks_struct callbacks_{};
  std::deque<Expected> expected_;

  bool started_ = false;
  bool pty_ = false;
  bool combined_ = false;        ///< the first output descriptor is the input, too
  UniqueFd input_own_;           ///< unless combined
  int input_ = -1;               ///< where the client's data goes; -1: discarded (after the start)
  Output output_, error_;
  bool backlog_ = false;         ///< the program's input is full: libssh keeps the client's data
  std::string pending_input_;    ///< read from libssh, not yet written
  std::deque<Rest> rests_;       ///< read from the program, not yet taken by libssh (a key exchange runs)
  std::optional<channel::Exited> exited_;
  bool moved_ = false;
  bool touched_ = false;         ///< a callback noted something since the last turn
  bool client_eof_ = false;
  Poller::TimerId end_timer_ = 0;  ///< the outputs are over: exit-status is waited for
  bool end_due_ = false;           ///< not any longer
  bool end_sent_ = false;          ///< our EOF is out, the program lives on
  bool client_closed_ = false;
  bool ended_ = false;           ///< finished by the program's end
  bool finished_ = false;
};

}  // namespace postern::sshd::net
