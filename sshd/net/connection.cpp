#include "sshd/net/connection.h"

#include "base/processes.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace postern::sshd::net {
namespace {

constexpr std::string_view all_methods = "publickey,password,keyboard-interactive";

std::uint16_t wire(Type type) { return static_cast<std::uint16_t>(type); }
std::uint16_t wire(channel::Type type) { return static_cast<std::uint16_t>(type); }

/// Cut to what fits, so that set() cannot fail.
template <std::size_t N>
void set_cut(FixedText<N>& field, std::string_view text) {
  static_cast<void>(field.set(text.substr(0, N)));
}

bool is_signal_name(std::string_view name) {
  return !name.empty() && name.size() <= 16 && std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '@' || c == '.' || c == '-';
         });
}

}  // namespace

Connection::Connection(ext::Server& server, UniqueFd socket, Link broker, const Serve& settings)
    : server_{server}, socket_{std::move(socket)}, client_fd_{socket_.get()}, settings_{settings}, link_{std::move(broker)} {
  ext::set_signer(this);
}

Connection::~Connection() {
  ext::set_signer(nullptr);
  for (const auto message : auth_requests_)
    if (message != nullptr) ssh_message_free(message);
  channels_.clear();
  forwards_.clear();
  if (event_ != nullptr) ssh_event_free(event_);
  if (session_ != nullptr) ssh_free(session_);
}

void Connection::quick_ack() {
  // Without both, a login takes 138 ms instead of 12 (Nagle and the peer's delayed ACK; libssh.md section 3.3). Linux forgets
  // TCP_QUICKACK by itself (tcp(7)), so it is set again after each read. Later, too: libssh's sftp sends each
  // write as a large and a small packet, and its Nagle keeps the small one until the large one is acknowledged (16 MiB: 22 s, with this 0.3).
  const int on = 1;
  ::setsockopt(client_fd_, IPPROTO_TCP, TCP_QUICKACK, &on, sizeof on);
}

void Connection::cork(bool on) {
  // Our answer to a KEXDH_INIT and our NEWKEYS in one segment; libssh writes them apart. PuTTY 0.78 that got the answer alone while it sent went to
  // sleep for good once the key exchange was over, with window and data left (measured: 1 to 3 of 100 on a busy machine, with this 0 of 400).
  if (std::exchange(corked_, on) == on) return;
  const int value = on ? 1 : 0;
  ::setsockopt(client_fd_, IPPROTO_TCP, TCP_CORK, &value, sizeof value);
}

void Connection::run() {
  ::fcntl(client_fd_, F_SETFL, ::fcntl(client_fd_, F_GETFL) | O_NONBLOCK);
  const int on = 1;
  ::setsockopt(client_fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  quick_ack();

  auto session = server_.accept(client_fd_);
  if (!session) {
    note(session.error().doing);
    return;
  }
  socket_.release();  // libssh's
  session_ = *session;
  if (ssh_options_set(session_, SSH_OPTIONS_REKEY_DATA, &settings_.rekey_bytes) != SSH_OK ||
      ssh_options_set(session_, SSH_OPTIONS_REKEY_TIME, &settings_.rekey_seconds) != SSH_OK) {
    note(ssh_get_error(session_));
    return;
  }
  ext::observe_packets(session_, *this);
  ssh_set_counters(session_, &socket_count_, &packet_count_);
  event_ = ssh_event_new();
  // Sends our version line; the rest of the key exchange runs by events (a blocking one costs 43 ms, libssh-0.12.md section 6).
  if (event_ == nullptr || ssh_handle_key_exchange(session_) == SSH_ERROR || ssh_event_add_session(event_, session_) != SSH_OK) return;
  quick_ack();  // that call has read, too: without this every third login took 46 ms longer, the delayed ACK of the client's KEXINIT

  grace_timer_ = poller_.after(std::chrono::milliseconds{settings_.login_grace_ms}, [this] {
    note("login grace time is over");
    disconnect(ext::DisconnectReason::by_application, "The login took too long.");
  });
  poller_.watch(client_fd_, POLLIN, [this](short events) {
    if ((events & POLLIN) != 0) heard_ = true;  // that it can be written to says nothing of the client
    on_client_socket();
  });
  poller_.watch(link_->fd(), POLLIN, [this](short) { link_ready_ = true; });
  turn();
  while (!done_) {
    poller_.run_once();
    if (!done_) turn();
  }
  // The last counts, for the log.
  if (login_ != Login::accepted) return;
  for (const auto& [number, forward] : forwards_)
    if (forward->handle() != nullptr && !forward->told) tell_forward_closed(number, forward->from_client(), forward->to_client());
  link_->flush();
}

bool Connection::client_gone() const { return (ssh_get_status(session_) & (SSH_CLOSED | SSH_CLOSED_ERROR)) != 0; }

void Connection::on_client_socket() {
  const int rc = ssh_event_dopoll(event_, 0);
  quick_ack();
  if (rc != SSH_ERROR && !client_gone()) return;
  if (!authenticated_) note(ssh_get_error(session_));
  done_ = true;
}

void Connection::turn() {
  collect_messages();
  check_amounts();
  handle_auth_requests();
  handle_link();
  handle_auth_requests();  // a verdict may have come
  serve_channels();
  if (done_) return;
  if (client_gone()) {
    done_ = true;
    return;
  }
  update_watches();
}

void Connection::update_watches() {
  link_->flush();
  // While the session (or the broker) lets our messages lie, the client waits, too; and so does one that asks without reading the answers.
  const bool read = !link_->wants_to_write() && ext::unsent(session_) < max_unsent;
  const bool write = (ssh_get_status(session_) & SSH_WRITE_PENDING) != 0;
  if (!write) cork(false);
  const short events = static_cast<short>((read ? POLLIN : 0) | (write ? POLLOUT : 0));
  if (events != 0)
    poller_.set_events(client_fd_, events);
  else
    poller_.disable(client_fd_);
  if (link_->gone()) {
    poller_.disable(link_->fd());
    poller_.after(std::chrono::milliseconds{0}, [] {});
  } else {
    poller_.set_events(link_->fd(), static_cast<short>(POLLIN | (link_->wants_to_write() ? POLLOUT : 0)));
  }
}

// ---------------------------------------------------------------- authentication

void Connection::on_auth_request(bool acceptable) {
  auth_seen_++;
  if (!acceptable) bad_user_name_ = true;
}

void Connection::collect_messages() {
  while (ssh_message message = ext::take_message(session_)) {
    switch (ssh_message_type(message)) {
      case SSH_REQUEST_AUTH:
        // An INFO_RESPONSE arrives as one as well, though no USERAUTH_REQUEST was seen.
        if (ssh_message_auth_kbdint_is_response(message) == 0) auth_got_++;
        auth_requests_.push_back(message);
        break;
      case SSH_REQUEST_SERVICE:
        handle_service(message);
        ssh_message_free(message);
        break;
      default:  // what our own handlers left to libssh: malformed, or before the login
        ssh_message_reply_default(message);
        ssh_message_free(message);
        break;
    }
    if (done_) return;
  }
  // libssh drops a request whose key it cannot parse, or whose signature is wrong, without any reply; the client would wait for ever
  // (research/libssh.md pitfall 5).
  for (; auth_got_ < auth_seen_; auth_got_++) auth_requests_.push_back(nullptr);
  if (auth_requests_.size() > max_waiting_auth_requests) {
    note("too many authentication requests at once");
    disconnect(ext::DisconnectReason::protocol_error, "Too many authentication requests.");
  }
}

void Connection::handle_service(ssh_message message) {
  const char* const name = ssh_message_service_service(message);
  if (name != nullptr && std::string_view{name} == "ssh-userauth")
    ssh_message_service_reply_success(message);
  else
    disconnect(ext::DisconnectReason::service_not_available, "This service is not available.");
}

void Connection::handle_auth_requests() {
  if (bad_user_name_ && !authenticated_ && !done_) {
    note("a user name that is none");
    disconnect(ext::DisconnectReason::illegal_user_name, "This is not a user name.");
  }
  while (!done_ && !auth_requests_.empty() && login_ != Login::asked) {
    const AuthMessage message = auth_requests_.front();
    if (authenticated_) {  // RFC 4252 section 5.1: silently ignored
      auth_requests_.pop_front();
      if (message != nullptr) ssh_message_free(message);
      continue;
    }
    const bool response = message != nullptr && ssh_message_auth_kbdint_is_response(message) != 0;
    const int method = message != nullptr ? ssh_message_subtype(message) : SSH_AUTH_METHOD_UNKNOWN;
    const bool known = method == SSH_AUTH_METHOD_NONE || method == SSH_AUTH_METHOD_PASSWORD || method == SSH_AUTH_METHOD_PUBLICKEY ||
                       method == SSH_AUTH_METHOD_INTERACTIVE;
    if (known && !response) {
      const char* const name = ssh_message_auth_user(message);
      const std::string user = name != nullptr ? name : "";
      if (user_.empty()) user_ = user;
      if (user.empty() || user != user_) {
        note("the user name changed");
        disconnect(ext::DisconnectReason::protocol_error, "The user name may not change.");
        return;
      }
      if (login_ == Login::open) {
        AskLogin ask;
        ask.method = method == SSH_AUTH_METHOD_NONE        ? Method::none
                     : method == SSH_AUTH_METHOD_PASSWORD  ? Method::password
                     : method == SSH_AUTH_METHOD_PUBLICKEY ? Method::publickey
                                                           : Method::keyboard_interactive;
        set_cut(ask.ssh_user, user_);
        const char* const client = ssh_get_clientbanner(session_);
        set_cut(ask.client_version, client != nullptr ? client : "");
        link_->send(wire(Type::ask_login), ask);
        login_ = Login::asked;
        return;  // the request stays in front until the verdict
      }
    }
    auth_requests_.pop_front();
    if (!known || response)
      fail_auth();
    else
      answer_accepted(message);
    if (message != nullptr) ssh_message_free(message);
  }
}

/// libssh has no limits of its own. Its queue behind a key exchange grows with every answer; before the login ignored, unknown and half packets may come for the whole grace time. One look reads at most 256 KiB
/// (MAX_BUF_SIZE), so this is exact enough.
void Connection::check_amounts() {
  if (done_ || client_gone()) return;
  if (ext::exchanging_keys(session_) && ext::unsent(session_) > max_unsent)
    return disconnect(ext::DisconnectReason::protocol_error, "Too many requests at once.");
  if (authenticated_ || (socket_count_.in_bytes <= settings_.max_bytes && packet_count_.in_packets <= settings_.max_packets)) return;
  const bool bytes = socket_count_.in_bytes > settings_.max_bytes;
  note(bytes ? "too many bytes before the login" : "too many packets before the login");
  disconnect(ext::DisconnectReason::protocol_error, "Too much before the login.");
}

void Connection::fail_auth() {
  if (++auth_failures_ >= settings_.max_auth_attempts) {
    note("too many authentication failures");
    disconnect(ext::DisconnectReason::protocol_error, "Too many authentication failures");
    return;
  }
  ext::send_auth_failure(session_, std::string{all_methods});
}

void Connection::answer_accepted(AuthMessage message) {
  if (ssh_message_subtype(message) == SSH_AUTH_METHOD_PUBLICKEY) {
    // Any key will do, the network has vouched for the peer; but the client must hold it: libssh has verified the signature.
    switch (ssh_message_auth_publickey_state(message)) {
      case SSH_PUBLICKEY_STATE_NONE: ssh_message_auth_reply_pk_ok_simple(message); return;
      case SSH_PUBLICKEY_STATE_VALID: break;
      default: fail_auth(); return;
    }
  }
  ssh_message_auth_reply_success(message, 0);
  authenticated();
}

void Connection::authenticated() {
  authenticated_ = true;
  ssh_set_counters(session_, nullptr, nullptr);
  poller_.cancel(grace_timer_);
  // Not now: a short command is over before, and its login is not slower for it.
  poller_.after(release_delay, [] { release_unused_memory(); });
  ext::send_host_keys(session_);
  heard_ = false;
  ask_alive_later();
}

/// sshd's ClientAliveInterval and ClientAliveCountMax (sshd_config(5)).
void Connection::ask_alive_later() {
  if (settings_.client_alive_interval_ms == 0) return;
  poller_.after(std::chrono::milliseconds{settings_.client_alive_interval_ms}, [this] {
    if (std::exchange(heard_, false)) {
      alive_unanswered_ = 0;
    } else if (++alive_unanswered_ > settings_.client_alive_count_max) {
      return disconnect(ext::DisconnectReason::by_application, "The client does not answer.");
    }
    // After a silent interval only, as sshd: an idle client answers one question an interval.
    ext::ask_alive(session_);
    ask_alive_later();
  });
}

void Connection::on_verdict(Message message) {
  const auto verdict = message.body<Verdict>();
  const bool accepted = verdict && verdict->accepted != 0;
  if (!verdict || !verdict->text.valid() || login_ != Login::asked || message.fds.size() != (accepted ? 1u : 0u)) {
    done_ = true;
    return;
  }
  std::string text{verdict->text.get()};
  if (!text.empty()) {
    if (text.back() != '\n') text += '\n';
    ssh_string banner = ssh_string_from_char(text.c_str());
    ssh_send_issue_banner(session_, banner);
    ssh_string_free(banner);
  }
  if (accepted) {
    login_ = Login::accepted;
    poller_.forget(link_->fd());
    // A session's messages to us are small; its Started carries descriptors.
    link_.emplace(std::move(message.fds.front()), channel::version, 4096);
    poller_.watch(link_->fd(), POLLIN, [this](short) { link_ready_ = true; });
    link_ready_ = true;
    return;
  }
  // The banner has said why. Out at once: after a USERAUTH_FAILURE, whatever it lists, OpenSSH's client would ask its user for a
  // password that does not exist. asyncssh and others raise "permission denied" for this reason code.
  disconnect(ext::DisconnectReason::no_more_auth_methods, "Permission denied.");
}

std::string Connection::ask_sign(const AskSign& ask) {
  const bool with_session = login_ == Login::accepted;
  link_->send(with_session ? wire(channel::Type::ask_sign) : wire(Type::ask_sign), ask);
  auto answer = link_->wait_for(with_session ? wire(channel::Type::signature) : wire(Type::signature), std::chrono::milliseconds{settings_.sign_ms});
  const auto signature = answer ? answer->body<Signature>() : std::nullopt;
  return signature && signature->blob.valid() ? std::string{signature->blob.get()} : std::string{};
}

std::string Connection::sign(std::uint32_t key, Digest digest, std::string_view hash) {
  AskSign ask;
  ask.key = key;
  ask.digest = digest;
  return ask.data.set(hash) ? ask_sign(ask) : std::string{};
}

std::vector<std::string> Connection::prove(const std::vector<std::string>& keys) {
  // Once a connection, as clients do: the broker's signatures are for key exchanges.
  if (keys.empty() || keys.size() > max_host_keys || std::exchange(keys_proven_, true)) return {};
  std::vector<std::string> signatures;
  for (const auto& blob : keys) {
    const auto known = ext::find_host_key(session_, blob);
    if (!known) return {};
    AskSign ask;
    ask.key = known->id;
    ask.digest = known->digest;
    ask.purpose = Purpose::possession;
    signatures.push_back(ask_sign(ask));
    if (signatures.back().empty()) return {};
  }
  return signatures;
}

// ---------------------------------------------------------------- the broker, then the session

void Connection::handle_link() {
  // Gone may also be seen while something is sent to it: then no event of its descriptor says so.
  if (done_ || (!link_ready_ && !link_->has_queued_messages() && !link_->gone())) return;
  link_ready_ = false;
  while (!done_) {
    auto message = link_->next();
    if (!message) break;
    if (login_ == Login::accepted)
      on_session_message(std::move(*message));
    else
      on_broker_message(std::move(*message));
  }
  if (done_ || !link_->gone()) return;
  if (login_ == Login::accepted)
    disconnect(ext::DisconnectReason::by_application, "The session ended.");
  else
    disconnect(ext::DisconnectReason::by_application, "The server is shutting down.");
}

void Connection::on_broker_message(Message message) {
  switch (static_cast<Type>(message.type)) {
    case Type::verdict: on_verdict(std::move(message)); break;
    case Type::signature: break;  // came after its time-out
    default: done_ = true; break;
  }
}

void Connection::on_session_message(Message message) {
  using channel::Type;
  const auto broken = [this] { disconnect(ext::DisconnectReason::by_application, "Internal error."); };
  const auto type = static_cast<Type>(message.type);
  if (type != Type::started && type != Type::forward_ready && type != Type::forward_incoming && !message.fds.empty()) return broken();
  switch (type) {
    case Type::answer_ok:
    case Type::answer_no: {
      const auto answer = message.body<channel::Answer>();
      if (!answer) return broken();
      SessionChannel* const target = find(answer->channel);
      if (target == nullptr) return;  // closed in the meantime
      const bool yes = type == Type::answer_ok;
      if (target->handle() != nullptr) {
        target->session_answered(yes);
      } else if (yes) {
        ssh_channel handle = ext::accept_open(session_, target->open_request());
        if (handle == nullptr) return broken();
        target->opened(session_, handle);
      } else {
        ext::refuse_open(session_, target->open_request(), ext::OpenFailure::resource_shortage, "no more sessions on this connection");
        limits_.erase(answer->channel);
        channels_.erase(answer->channel);
      }
      return;
    }
    case Type::started: {
      const auto started = message.body<channel::Started>();
      if (!started) return broken();
      const std::size_t expected = started->combined != 0 ? 1u : static_cast<std::size_t>((started->input != 0) + (started->output != 0) + (started->error != 0));
      if (message.fds.size() != expected) return broken();
      SessionChannel* const target = find(started->channel);
      if (target == nullptr || target->finished()) return;  // the descriptors close with the message
      target->session_answered(true);
      target->started(*started, std::move(message.fds));
      return;
    }
    case Type::exited: {
      const auto exited = message.body<channel::Exited>();
      if (!exited) return broken();
      if (SessionChannel* const target = find(exited->channel)) target->exited(*exited);
      return;
    }
    case Type::forward_ready: {
      if (message.fds.size() != 1 || !message.body<channel::ForwardReady>()) return broken();
      return on_forward_ready(std::move(message));
    }
    case Type::forward_failed: {
      const auto failed = message.body<channel::ForwardFailed>();
      if (!failed) return broken();
      return on_forward_failed(*failed);
    }
    case Type::forward_incoming: {
      if (message.fds.size() != 1 || !message.body<channel::ForwardIncoming>()) return broken();
      return on_forward_incoming(std::move(message));
    }
    case Type::forward_listening: {
      const auto listening = message.body<channel::ForwardListening>();
      if (!listening) return broken();
      for (auto& reply : global_replies_)
        if (reply.number == listening->number && !reply.result) {
          reply.result = listening->ok != 0;
          if (reply.show_port) reply.port = listening->port;
        }
      return send_global_replies();
    }
    case Type::forward_end: {
      for (auto& [number, forward] : forwards_) forward->abort();
      return;
    }
    case Type::watch_activity: {
      const auto watch = message.body<channel::WatchActivity>();
      if (!watch || watch->interval_ms == 0) return broken();
      report_interval_ = std::chrono::milliseconds{watch->interval_ms};
      return;
    }
    case Type::disconnect: {
      const auto text = message.body<channel::Disconnect>();
      if (!text) return broken();
      return on_disconnect(std::string{text->text.get()});
    }
    case Type::signature: return;  // came after its time-out
    default: return broken();
  }
}

void Connection::on_disconnect(const std::string& text) {
  const auto deadline = std::chrono::steady_clock::now() + flush_limit / 2;
  if (!text.empty())
    for (auto& [number, channel] : channels_) channel->show(text);
  for (;;) {  // no program output any more, only these lines
    bool sent = true;
    for (auto& [number, channel] : channels_) sent = channel->send_rests() && sent;
    if (sent || client_gone() || std::chrono::steady_clock::now() >= deadline) break;
    pollfd polled{client_fd_, POLLIN | POLLOUT, 0};
    ::poll(&polled, 1, 10);
    ssh_event_dopoll(event_, 0);
  }
  disconnect(ext::DisconnectReason::by_application, text.empty() ? "Connection closed." : text);
}

// ---------------------------------------------------------------- channels

SessionChannel* Connection::find(std::uint32_t number) {
  const auto it = channels_.find(number);
  return it != channels_.end() ? it->second.get() : nullptr;
}

SessionChannel* Connection::find(ssh_channel handle) {
  for (auto& [number, channel] : channels_)
    if (channel->handle() == handle) return channel.get();
  return nullptr;
}

void Connection::on_channel_open(const ext::ChannelOpen& open) {
  if (!authenticated_ || done_) return;
  if (open.type != "session") {
    if (open.type == "direct-tcpip" || open.type == "direct-streamlocal@openssh.com") return ask_forward(open);
    const bool known = open.type == "tun@openssh.com";
    ext::refuse_open(session_, open, known ? ext::OpenFailure::prohibited : ext::OpenFailure::unknown_type,
                     known ? "tunnels are not offered here" : "unknown channel type");
    return;
  }
  if (channels_.size() >= max_channels) {
    ext::refuse_open(session_, open, ext::OpenFailure::resource_shortage, "too many channels");
    return;
  }
  while (channels_.contains(next_number_)) next_number_ = (next_number_ + 1) % 65536;
  const std::uint32_t number = next_number_;
  next_number_ = (next_number_ + 1) % 65536;
  channels_.emplace(number, std::make_unique<SessionChannel>(number, open, poller_));
  limits_.emplace(number, Limits{});
  link_->send(wire(channel::Type::open), channel::ChannelRef{number});
}

void Connection::on_open_answer(ssh_channel handle, bool success) {
  for (auto& [number, forward] : forwards_)
    if (forward->handle() == handle) forward->answered(success);
}

void Connection::on_channel_request(ssh_channel handle, ext::ChannelRequest request) {
  SessionChannel* const target = find(handle);
  if (target == nullptr || target->finished() || target->client_closed() || done_) {
    if (request.want_reply) ext::reply_request(handle, false);
    return;
  }
  if (target->unanswered() >= max_waiting_requests) return disconnect(ext::DisconnectReason::protocol_error, "Too many requests at once.");
  handle_request(*target, std::move(request));
}

void Connection::handle_request(SessionChannel& target, ext::ChannelRequest request) {
  using Kind = ext::ChannelRequest::Kind;
  const std::uint32_t number = target.number();
  Limits& limits = limits_[number];
  const auto refuse = [&] { target.answered(request.want_reply, false); };
  const auto start = [&](channel::StartKind kind) {
    const bool nameless = kind == channel::StartKind::subsystem && request.text.empty();
    if (target.start_asked || nameless || request.text.size() > channel::max_command) return refuse();
    target.start_asked = true;
    target.asked(request.want_reply, true);
    channel::Start body;
    body.channel = number;
    body.kind = kind;
    link_->send(wire(channel::Type::start), body, request.text);
  };
  switch (request.kind) {
    case Kind::pty: {
      auto body = std::make_unique<channel::Pty>();
      body->channel = number;
      body->cols = request.cols;
      body->rows = request.rows;
      body->xpixels = request.xpixels;
      body->ypixels = request.ypixels;
      static_cast<void>(body->term.set(request.text));  // too long for a terminal's name: better none than no terminal
      if (target.start_asked || limits.pty || !body->modes.set(request.value)) return refuse();
      limits.pty = true;
      target.asked(request.want_reply);
      link_->send(wire(channel::Type::pty), *body);
      return;
    }
    case Kind::env: {
      if (target.start_asked || request.text.empty() || request.text.size() > channel::max_env_name ||
          request.value.size() > channel::max_env_value || limits.env >= channel::max_env_count ||
          request.text.size() + request.value.size() > channel::max_env_bytes - limits.env_bytes)
        return refuse();
      limits.env++;
      limits.env_bytes += request.text.size() + request.value.size();
      target.asked(request.want_reply);
      channel::Env body;
      body.channel = number;
      body.name_length = static_cast<std::uint32_t>(request.text.size());
      link_->send(wire(channel::Type::env), body, request.text + request.value);
      return;
    }
    case Kind::shell: request.text.clear(); return start(channel::StartKind::shell);
    case Kind::exec: return start(channel::StartKind::exec);
    case Kind::subsystem: return start(channel::StartKind::subsystem);
    case Kind::window_change: {  // without a reply (RFC 4254 section 6.7), but who wants one gets sshd's: yes, with a terminal and without
      channel::WindowChange body;
      body.channel = number;
      body.cols = request.cols;
      body.rows = request.rows;
      body.xpixels = request.xpixels;
      body.ypixels = request.ypixels;
      link_->send(wire(channel::Type::window_change), body);
      return target.answered(request.want_reply, true);
    }
    case Kind::signal: {  // likewise (RFC 4254 section 6.9); whether it was sent is session's to say
      channel::Signal body;
      body.channel = number;
      if (!is_signal_name(request.text) || !body.name.set(request.text)) return refuse();
      if (request.want_reply) target.asked(true);
      link_->send(wire(request.want_reply ? channel::Type::ask_signal : channel::Type::signal), body);
      return;
    }
    case Kind::send_break:
      target.asked(request.want_reply);
      link_->send(wire(channel::Type::send_break), channel::ChannelRef{number});
      return;
    case Kind::end_of_write:
      target.client_reads_no_more();
      return refuse();  // sshd's answer, which does what is asked all the same (serverloop.c, server_input_channel_req)
    case Kind::agent:
      if (target.start_asked) return refuse();  // the program has its environment already
      target.asked(request.want_reply);
      link_->send(wire(channel::Type::agent), channel::ChannelRef{number});
      return;
    case Kind::x11: {
      channel::X11 body;
      body.channel = number;
      body.single = request.single ? 1 : 0;
      body.screen = request.screen;
      if (target.start_asked || !body.protocol.set(request.text) || !body.cookie.set(request.value)) return refuse();
      target.asked(request.want_reply);
      link_->send(wire(channel::Type::x11), body);
      return;
    }
    case Kind::other: return refuse();
  }
}

void Connection::serve_channels() {
  if (done_ || login_ != Login::accepted) return;
  const bool alone = channels_.size() + forwards_.size() == 1;
  // libssh may handle packets for one channel while it writes for another: a second look, at most three times, so that nobody starves.
  bool again = true;
  bool moved = false;
  forwards_first_ = !forwards_first_;
  for (int round = 0; again && round < 4; round++) {
    again = false;
    if (forwards_first_) again = serve_forwards(alone, moved);
    for (auto& [number, channel] : channels_)
      if (round == 0 || channel->needs_turn()) channel->turn(alone);
    for (auto it = channels_.begin(); it != channels_.end();) {
      SessionChannel& channel = *it->second;
      moved = channel.take_moved() || moved;
      if (channel.finished()) {
        if (limits_.erase(channel.number()) != 0) link_->send(wire(channel.how_it_ended()), channel::ChannelRef{channel.number()});
        if (channel.client_closed()) {
          it = channels_.erase(it);
          continue;
        }
      }
      again = again || channel.needs_turn();
      ++it;
    }
    if (!forwards_first_) again = serve_forwards(alone, moved) || again;
  }
  const bool sends = may_send();
  // Each of the two may have seen to the other's, as libssh handles packets while it reads and writes.
  for (auto& [number, channel] : channels_) {
    again = again || channel->needs_turn();
    channel->update_watches();
  }
  for (auto& [number, forward] : forwards_) {
    again = again || forward->needs_turn(sends);
    forward->update_watch(sends);
  }
  again = again || link_->has_queued_messages();
  if (moved && report_interval_.count() > 0) report_activity();
  if (again) poller_.after(std::chrono::milliseconds{0}, [] {});  // the rest in the next turn, at once
}

// ---------------------------------------------------------------- forwardings

bool Connection::may_send() const { return !ext::exchanging_keys(session_) && (ssh_get_status(session_) & SSH_WRITE_PENDING) == 0; }

/// One turn of each that has something to do, the one behind the last sender first: a fast one must not keep the others waiting. True when
/// there is more to do.
bool Connection::serve_forwards(bool alone, bool& moved) {
  if (forwards_.empty()) return false;
  const std::size_t most = alone ? SessionChannel::shared_read : 64 * 1024;
  auto it = forwards_.upper_bound(last_served_);
  for (std::size_t left = forwards_.size(); left > 0; left--) {
    if (it == forwards_.end()) it = forwards_.begin();
    const bool sends = may_send();
    if (it->second->needs_turn(sends) && it->second->turn(sends ? most : 0)) last_served_ = it->first;
    ++it;
  }
  // The client's windows add up: so much may wait for sockets that nobody reads, and then the one that has most of it goes.
  std::size_t kept = 0;
  ForwardChannel* fullest = nullptr;
  for (auto& [number, forward] : forwards_) {
    const std::size_t now = forward->kept();
    kept += now;
    if (now > 0 && (fullest == nullptr || now > fullest->kept())) fullest = forward.get();
  }
  if (kept > max_kept) fullest->abort();
  bool again = false;
  for (auto at = forwards_.begin(); at != forwards_.end();) {
    ForwardChannel& forward = *at->second;
    moved = forward.take_moved() || moved;
    if (forward.finished() && !std::exchange(forward.told, true)) tell_forward_closed(at->first, forward.from_client(), forward.to_client());
    if (forward.gone()) {
      at = forwards_.erase(at);
      continue;
    }
    again = again || forward.needs_turn(may_send());
    ++at;
  }
  return again;
}

void Connection::tell_forward_closed(std::uint32_t number, std::uint64_t from_client, std::uint64_t to_client) {
  link_->send(wire(channel::Type::forward_closed), channel::ForwardClosed{number, 0, from_client, to_client});
}

void Connection::ask_forward(const ext::ChannelOpen& open) {
  const auto refuse = [&](ext::OpenFailure reason, const char* text) { ext::refuse_open(session_, open, reason, text); };
  const bool tcp = open.type == "direct-tcpip";
  channel::ForwardTarget body;
  body.kind = tcp ? channel::ForwardKind::tcp : channel::ForwardKind::unix_socket;
  body.port = tcp ? open.port : 0;
  // Code 2 as sshd for what cannot be connected to, whatever the rules say of it.
  if (open.malformed || open.target.empty() || open.target.find('\0') != std::string::npos || !body.target.set(open.target) ||
      (tcp && (open.port == 0 || open.port > 65535)))
    return refuse(ext::OpenFailure::connect_failed, "this is not a target");
  if (forwards_.size() >= max_forwards) return refuse(ext::OpenFailure::resource_shortage, "too many forwardings on this connection");
  while (forwards_.contains(next_forward_)) next_forward_ = (next_forward_ + 1) % 65536;
  body.number = next_forward_;
  next_forward_ = (next_forward_ + 1) % 65536;
  forwards_.emplace(body.number, std::make_unique<ForwardChannel>(body.number, open, poller_));
  link_->send(wire(channel::Type::forward_connect), body);
}

void Connection::on_forward_ready(Message message) {
  const auto it = forwards_.find(message.body<channel::ForwardReady>()->number);
  if (it == forwards_.end() || it->second->handle() != nullptr) return;
  ssh_channel handle = ext::accept_open(session_, it->second->open_request());
  if (handle == nullptr) return disconnect(ext::DisconnectReason::by_application, "Internal error.");
  it->second->opened(session_, handle, std::move(message.fds.front()), true);
}

void Connection::on_forward_failed(const channel::ForwardFailed& failed) {
  const auto it = forwards_.find(failed.number);
  if (it == forwards_.end() || it->second->handle() != nullptr) return;
  const bool known = failed.reason >= 1 && failed.reason <= 4;
  ext::refuse_open(session_, it->second->open_request(), known ? static_cast<ext::OpenFailure>(failed.reason) : ext::OpenFailure::connect_failed,
                   std::string{failed.text.get()});
  forwards_.erase(it);
}

void Connection::on_forward_incoming(Message message) {
  const auto said = *message.body<channel::ForwardIncoming>();
  if (said.number < channel::first_incoming || forwards_.contains(said.number)) return disconnect(ext::DisconnectReason::by_application, "Internal error.");
  if (forwards_.size() >= max_forwards) return tell_forward_closed(said.number, 0, 0);
  ext::OutgoingOpen open;
  switch (said.kind) {
    case channel::ForwardKind::tcp: open.type = ext::OutgoingOpen::Type::forwarded_tcpip; break;
    case channel::ForwardKind::unix_socket: open.type = ext::OutgoingOpen::Type::forwarded_socket; break;
    case channel::ForwardKind::agent: open.type = ext::OutgoingOpen::Type::agent; break;
    case channel::ForwardKind::x11: open.type = ext::OutgoingOpen::Type::x11; break;
  }
  open.target = said.target.get();
  open.port = said.port;
  open.origin = said.origin.get();
  open.origin_port = said.origin_port;
  ssh_channel handle = ext::open_outgoing(session_, open);
  if (handle == nullptr) return disconnect(ext::DisconnectReason::by_application, "Internal error.");
  auto forward = std::make_unique<ForwardChannel>(said.number, ext::ChannelOpen{}, poller_);
  forward->opened(session_, handle, std::move(message.fds.front()), false);
  forwards_.emplace(said.number, std::move(forward));
}

void Connection::on_global_request(ext::GlobalRequest request) {
  using Kind = ext::GlobalRequest::Kind;
  if (!authenticated_ || done_) return;
  if (global_replies_.size() >= max_waiting_requests) return disconnect(ext::DisconnectReason::protocol_error, "Too many requests at once.");
  GlobalReply reply{next_request_++, request.want_reply, false, std::nullopt};
  const bool tcp = request.kind == Kind::listen_tcp || request.kind == Kind::cancel_tcp;
  if (tcp || request.kind == Kind::listen_socket || request.kind == Kind::cancel_socket) {
    channel::ForwardTarget body;
    body.number = reply.number;
    body.kind = tcp ? channel::ForwardKind::tcp : channel::ForwardKind::unix_socket;
    body.port = tcp ? request.port : 0;
    const bool listen = request.kind == Kind::listen_tcp || request.kind == Kind::listen_socket;
    reply.show_port = request.kind == Kind::listen_tcp && request.port == 0;
    // As sshd: who asks for any port and wants no answer would never learn which.
    if (request.port > 65535 || request.target.find('\0') != std::string::npos || (reply.show_port && !request.want_reply) || !body.target.set(request.target))
      reply.result = false;
    else
      link_->send(wire(listen ? channel::Type::forward_listen : channel::Type::forward_cancel), body);
  } else {
    if (request.kind == Kind::no_more_sessions) ext::refuse_more_sessions();
    if (request.kind == Kind::prove_host_keys) reply.signatures = prove(request.keys);
    // keepalive@openssh.com and all else: as sshd, which knows none of them (serverloop.c, server_input_global_request).
    reply.result = request.kind == Kind::no_more_sessions || !reply.signatures.empty();
  }
  global_replies_.push_back(reply);
  send_global_replies();
}

void Connection::send_global_replies() {
  while (!global_replies_.empty() && global_replies_.front().result) {
    const GlobalReply& reply = global_replies_.front();
    if (!reply.signatures.empty())
      ext::reply_with_signatures(session_, reply.signatures);
    else if (reply.want_reply)
      ext::reply_global(session_, *reply.result, reply.port);
    global_replies_.pop_front();
  }
}

void Connection::report_activity() {
  if (report_timer_ != 0) {
    unreported_ = true;
    return;
  }
  link_->send(wire(channel::Type::activity), channel::Activity{});
  report_timer_ = poller_.after(report_interval_, [this] {
    report_timer_ = 0;
    if (std::exchange(unreported_, false)) report_activity();
  });
}

// ---------------------------------------------------------------- the end

void Connection::note(const std::string& text) {
  if (login_ == Login::accepted || link_->gone()) return;  // the broker listens until the verdict
  Note body;
  set_cut(body.text, text);
  link_->send(wire(Type::note), body);
}

void Connection::flush(std::chrono::steady_clock::time_point deadline) {
  while ((ssh_get_status(session_) & SSH_WRITE_PENDING) != 0 && !client_gone()) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return;
    pollfd polled{client_fd_, POLLOUT, 0};
    ::poll(&polled, 1, static_cast<int>(left.count()));
    ssh_event_dopoll(event_, 0);
    while (ssh_message message = ext::take_message(session_)) ssh_message_free(message);  // it reads as well
  }
}

void Connection::disconnect(ext::DisconnectReason reason, const std::string& text) {
  if (done_) return;
  done_ = true;
  if (session_ == nullptr || client_gone()) return;
  ext::send_disconnect(session_, reason, text);
  const auto deadline = std::chrono::steady_clock::now() + flush_limit;
  flush(deadline);
  if (client_gone()) return;
  // Closing with the client's bytes unread would reset the connection, and the client would never read our text.
  ::shutdown(client_fd_, SHUT_WR);
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
    pollfd polled{client_fd_, POLLIN, 0};
    char thrown_away[4096];
    if (left.count() <= 0 || ::poll(&polled, 1, static_cast<int>(left.count())) <= 0) return;
    const ssize_t n = ::recv(client_fd_, thrown_away, sizeof thrown_away, MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) return;
  }
}

}  // namespace postern::sshd::net
