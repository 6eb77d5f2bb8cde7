#include "sshd/broker/connection.h"

#include "base/log.h"
#include "sshd/broker/processes.h"
#include "sshd/broker/refusal.h"
#include "sshd/broker/session_rules.h"
#include "sshd/protocol/net.h"
#include "sshd/protocol/session.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <utility>

namespace postern::sshd::broker {
namespace {

using namespace std::chrono_literals;

// Past session.farewell_time, which the session keeps by itself.
constexpr auto farewell_slack = 200ms;
// Past session.kill_time: to see that they are gone; then past what a session waits for the end of a recording (Tee).
constexpr auto programs_slack = 2s, recording_slack = 35s;
// Signatures for rekeys. OpenSSH's chacha20 asks every GiB and direction, so a fast bulk transfer needs one a second; `RekeyLimit` may
// ask for more. Too fast is answered later, not refused (that would end a good connection); a queue of them is refused.
constexpr double sign_bucket = 10, sign_per_second = 2, sign_debt = 8;
// A policy that loads must not fail at the login.
static_assert(auth::policy::most_accept_env == max_accept_env);
static_assert(auth::policy::longest_accept_env == sizeof(decltype(ConnectionFacts::accept_env)::value_type{}.text));
// What a worker may tell the log, in one connection.
constexpr unsigned most_notes = 32;

int pidfd_signal(int pidfd, int signal) { return static_cast<int>(::syscall(SYS_pidfd_send_signal, pidfd, signal, nullptr, 0)); }

std::string join(const std::vector<std::string>& parts) {
  std::string out;
  for (const auto& p : parts) out += (out.empty() ? "" : ",") + p;
  return out;
}

std::vector<std::string> split(std::string_view text) {
  std::vector<std::string> out;
  while (!text.empty()) {
    const auto comma = text.find(',');
    out.emplace_back(text.substr(0, comma));
    text = comma == std::string_view::npos ? std::string_view{} : text.substr(comma + 1);
  }
  return out;
}

/// For the client: what the provider has to say, or that it says nothing now.
std::string sentence_of(const Error& error) {
  return error.user_message.empty() ? "this server cannot learn who you are right now; try again later" : error.user_message;
}

// Denials that the client earned by what it asked for. All others are ours: no identity now, no resources, a policy that has just changed.
bool is_an_answer(std::string_view why) {
  return why == "policy" || why == "invalid_user_name" || why == "no_such_account" || why == "account_has_another_name" || why == "account" ||
         why == "identity_refused";
}

// What the policy says of recording, in the form that is compared when the policy or the network changes.
struct RecordingTerms {
  bool record, enforce;
  std::string tag;
  bool operator==(const RecordingTerms&) const = default;
};

}  // namespace

Connection::Connection(Broker& broker, UniqueFd client, Endpoint peer, Endpoint local, std::string source)
    : broker_{broker}, client_{std::move(client)}, peer_{peer}, local_{local}, counted_as_{std::move(source)}, grace_{broker.io()}, end_timer_{broker.io()} {
  const Id id = Id::random();
  facts_.connection_id = id.bytes;
  id_ = id.text();
}

Connection::Connection(Broker& broker, const ConnectionFacts& facts, std::unique_ptr<LocalSocket> session, UniqueFd session_pidfd, UniqueFd net_pidfd)
    : broker_{broker},
      peer_{Address::parse(facts.peer_address.get()).value_or(Address{}), facts.peer_port},
      local_{Address::parse(facts.server_address.get()).value_or(Address{}), facts.server_port},
      phase_{Phase::live},
      id_{facts.id().text()},
      facts_{facts},
      ssh_user_{facts.ssh_user.get()},
      signed_once_{true},
      granted_{true},
      counted_{false},
      session_{std::move(session)},
      net_pidfd_{std::move(net_pidfd)},
      session_watch_{std::make_unique<boost::asio::posix::stream_descriptor>(broker.io(), session_pidfd.release())},
      grace_{broker.io()},
      end_timer_{broker.io()} {}

Connection::~Connection() {
  // Before the grant a worker without a broker has nothing to do; afterwards it lives on by itself. Once over, it is dead already, and
  // the broker may be, too (handlers that io_context destroys last).
  if (!granted_ && !done_) kill_net();
}

void Connection::start() {
  spdlog::info("event=connection connection={} peer={} server={}", id_, peer_.text(), local_.text());
  grace_.expires_after(broker_.config().limits.login_grace_time + 1s);  // net's own timer comes first and can tell the client
  grace_.async_wait([self = shared_from_this()](boost::system::error_code ec) {
    if (!ec && !self->authenticated()) self->break_off("login grace time is over");
  });
  generation_ = broker_.generation();
  broker_.provider().who_is(peer_, [self = shared_from_this()](auto answer) { self->identified(std::move(answer)); });
}

void Connection::identified(Expected<std::optional<Node>> answer) {
  if (phase_ != Phase::identifying || done_) return;
  if (!answer) {
    const bool known = answer.error().code != EAGAIN;
    spdlog::warn("event=login verdict=deny connection={} peer={} why={} detail={}", id_, peer_.address.text(), known ? "identity_refused" : "identity_unavailable",
                 safe_quoted(answer.error().doing));
    tell("login", "deny", known ? "identity_refused" : "identity_unavailable", answer.error().doing);
    if (known) punish(Offence::auth_failed);
    return refuse_unidentified(sentence_of(answer.error()));
  }
  if (!*answer) {
    spdlog::info("event=login verdict=deny connection={} peer={} why=no_identity", id_, peer_.address.text());
    tell("login", "deny", "no_identity");
    punish(Offence::no_auth);
    return refuse_unidentified("this network does not know " + peer_.address.text());
  }
  source_ = std::move(**answer);
  if (!broker_.count_as(counted_as_, source_, peer_.address)) {
    spdlog::warn("event=connection_refused peer={} node={} why=too_many_or_penalty", peer_.text(), safe_quoted(source_.name));
    tell("login", "deny", "too_many_connections_or_penalty");
    return refuse_unidentified("too many connections or failed attempts from here; try again later");
  }
  if (broker_.self(local_.address) == nullptr) {
    spdlog::error("event=login verdict=deny connection={} why=server_address_unknown server={}", id_, local_.address.text());
    tell("login", "deny", "server_address_unknown");
    return refuse_unidentified("the network does not know this server's address");
  }
  phase_ = Phase::handshake;
  broker_.give_worker(shared_from_this());
}

void Connection::refuse_unidentified(const std::string& reason) {
  phase_ = Phase::ending;
  broker_.turn_away(std::move(client_), reason);
  over();
}

void Connection::serve(Broker::Worker worker) {
  if (done_ || phase_ != Phase::handshake) return;
  net_token_ = worker.token;
  net_pid_ = worker.child.pid;
  net_pidfd_ = std::move(worker.child.pidfd);
  net_ = std::move(worker.socket);
  net_->start([weak = weak_from_this()](Message m) { if (const auto self = weak.lock()) self->on_net(std::move(m)); },
              [weak = weak_from_this()](const std::string&) {
                // Its end; why, the pidfd and the zygote tell. After the verdict it closes this one itself.
                if (const auto self = weak.lock(); self && !self->authenticated() && self->phase_ != Phase::opening) self->break_off("the client is gone");
              });
  watch_net();
  net::Serve serve;
  serve.login_grace_ms = static_cast<std::uint32_t>(broker_.config().limits.login_grace_time.count());
  serve.max_auth_attempts = broker_.config().limits.auth_attempts;
  serve.max_bytes = broker_.config().limits.bytes_before_login;
  serve.max_packets = broker_.config().limits.packets_before_login;
  (void)serve.peer_address.set(peer_.address.text());
  serve.peer_port = peer_.port;
  serve.client_alive_interval_ms = static_cast<std::uint32_t>(broker_.config().ssh.client_alive_interval.count());
  serve.client_alive_count_max = broker_.config().ssh.client_alive_count_max;
  serve.sign_ms = static_cast<std::uint32_t>(broker_.config().ssh.sign_timeout.count());
  serve.rekey_bytes = broker_.config().ssh.rekey_bytes;
  serve.rekey_seconds = static_cast<std::uint32_t>(broker_.config().ssh.rekey_interval / std::chrono::seconds{1});
  std::vector<UniqueFd> fds;
  fds.push_back(std::move(client_));
  net_->send(static_cast<std::uint16_t>(net::Type::serve), serve, std::move(fds));
}

void Connection::watch_net() {
  const int copy = ::fcntl(net_pidfd_.get(), F_DUPFD_CLOEXEC, 3);
  if (copy < 0) return;
  net_watch_ = std::make_unique<boost::asio::posix::stream_descriptor>(broker_.io(), copy);
  when_ended(&Connection::net_watch_, &Connection::net_ended);
}

void Connection::when_ended(Watch watch, void (Connection::*then)()) {
  (this->*watch)->async_wait(boost::asio::posix::descriptor_base::wait_read, [weak = weak_from_this(), watch, then](boost::system::error_code ec) {
    const auto self = weak.lock();
    if (ec || !self || self->done_) return;
    // Asio's wait may end for nothing: events of a descriptor that was closed in the same round reach the next one that gets its state
    // (epoll_reactor; seen when a client came in the moment another one left: it was put out at once).
    pollfd p{(self.get()->*watch)->native_handle(), POLLIN, 0};
    if (::poll(&p, 1, 0) <= 0) return self->when_ended(watch, then);
    (self.get()->*then)();
  });
}

void Connection::net_ended() {
  net_pid_ = -1;
  if (!granted_) return break_off("the client is gone");
  // The session sees it too and ends by itself; its pidfd ends this connection.
}

void Connection::on_net(Message message) {
  const auto type = static_cast<net::Type>(message.type);
  if (!message.fds.empty()) return break_off("net sent a descriptor");
  if (type == net::Type::note) {
    const auto note = message.body<net::Note>();
    if (!note || !note->text.valid()) return break_off("net sent a malformed message");
    if (++notes_ > most_notes) return break_off("net sent too many notes");
    spdlog::info("event=net_note connection={} text={}", id_, safe_quoted(note->text.get()));
    return;
  }
  if (type == net::Type::ask_sign && phase_ == Phase::handshake) {
    const auto ask = message.body<net::AskSign>();
    // One before the verdict: that hash is the session id. There is no second key exchange before a login.
    if (!ask || signed_once_ || ask->purpose != net::Purpose::exchange_hash || !ask->data.valid() || !HostKeys::may_sign(ask->data.get())) return break_off("net asked for a signature it may not have");
    signed_once_ = true;
    (void)facts_.exchange_hash.set(ask->data.get());
    broker_.keys().sign(*ask, {}, broker_.io().get_executor(), weak_from_this(), [weak = weak_from_this()](const std::string& blob) {
      const auto self = weak.lock();
      if (!self || !self->net_) return;
      net::Signature answer;
      (void)answer.blob.set(blob);
      self->net_->send(static_cast<std::uint16_t>(net::Type::signature), answer);
    });
    return;
  }
  if (type == net::Type::ask_login && phase_ == Phase::handshake && signed_once_ && ssh_user_.empty()) {
    const auto ask = message.body<net::AskLogin>();
    if (!ask || !ask->ssh_user.valid() || !ask->client_version.valid() || ask->method > net::Method::keyboard_interactive)
      return break_off("net sent a malformed question");
    ssh_user_ = ask->ssh_user.get();
    if (ssh_user_.empty()) ssh_user_ = std::string(1, '\0');  // asked and answered
    client_version_ = ask->client_version.get();
    generation_ = never;  // asked once more in any case: whoever stood for this peer may have gone since, which changes nothing else
    return when_still_the_same([self = shared_from_this()] { self->login(); });
  }
  break_off("net sent message " + std::to_string(message.type) + " out of order");
}

Address Connection::address_in_network(const Node& node) const {
  const auto& all = node.addresses;
  return all.empty() || std::find(all.begin(), all.end(), peer_.address) != all.end() ? peer_.address : all.front();
}

Rules::Decision Connection::decide(const Node& source, const Node& destination, std::optional<std::uint32_t> uid) const {
  return broker_.rules().decide(broker_.provider(),
                                {.source = source, .source_address = address_in_network(source), .destination = destination, .ssh_user = ssh_user_, .uid = uid, .destination_address = local_.address});
}

void Connection::when_still_the_same(std::function<void()> go_on) {
  const auto now = broker_.generation();
  if (generation_ == now) return go_on();
  // A reload since then: what it changed holds for this login, too.
  broker_.provider().who_is(peer_, [self = shared_from_this(), go_on = std::move(go_on), now](Expected<std::optional<Node>> answer) {
    if (self->done_ || self->phase_ == Phase::ending) return;
    if (!answer) return self->deny(sentence_of(answer.error()), answer.error().code != EAGAIN ? "identity_refused" : "identity_unavailable");
    if (!*answer) return self->deny("this network does not know " + self->peer_.address.text(), "no_identity");
    const Node& node = **answer;
    if (node.id != self->source_.id || node.login != self->source_.login || node.tags != self->source_.tags)
      return self->deny("the network changed while you connected; connect again", "another_node");
    self->source_ = node;  // its name, attributes and capabilities are those of now
    self->generation_ = now;
    self->when_still_the_same(go_on);
  });
}

bool Connection::let_in(Rules::Decision decision) {
  using auth::policy::Outcome;
  verdict_ = std::move(decision.verdict);
  if (!decision.problem.empty()) spdlog::warn("event=rules_unreadable connection={} node={} problem={}", id_, safe_quoted(source_.name), safe_quoted(decision.problem, 1000));
  if (!decision.unavailable.empty()) {
    deny(decision.unavailable, "rules_unavailable");
    return false;
  }
  if (verdict_.outcome == Outcome::check) {
    deny("this login needs a check of your identity, which this server cannot ask for yet; ask the administrator", "check_not_available");
    return false;
  }
  if (verdict_.outcome != Outcome::accept) {
    deny(auth::policy::denial_text(verdict_.denial, ssh_user_), "policy");
    return false;
  }
  auto rules = effective_rules(verdict_.session_rules, source_, broker_.config());
  if (!rules) {
    spdlog::warn("event=session_rules_unreadable connection={} node={} problem={}", id_, safe_quoted(source_.name), safe_quoted(rules.error().doing, 1000));
    deny("this server cannot read what the network says of your sessions; ask the administrator", "session_rules_unreadable");
    return false;
  }
  if (rules->command_conflict) {
    deny("two rules force different commands on this login; ask the administrator", "command_conflict");
    return false;
  }
  rules_ = std::move(*rules);
  return true;
}

void Connection::login() {
  const Node* destination = broker_.self(local_.address);
  if (!auth::policy::is_mappable_user_name(ssh_user_))
    return deny(auth::policy::denial_text(auth::policy::Denial::user_not_permitted, ssh_user_ == std::string(1, '\0') ? "" : ssh_user_), "invalid_user_name");
  if (destination == nullptr) return deny("the network does not know this server's address", "server_address_unknown");
  if (!let_in(decide(source_, *destination, std::nullopt))) return;
  // Phase 1 found a candidate; only now is anything started for this peer.
  auto pair = seqpacket_pair();
  if (!pair) return deny("this server is out of resources; try again later", pair.error().doing);
  phase_ = Phase::looking_up;
  auto end = std::make_shared<UniqueFd>(std::move(pair->first));
  broker_.session_zygote().fork(std::move(pair->second), [self = shared_from_this(), end](Expected<Child> child) {
    if (self->done_ || self->phase_ != Phase::looking_up) return;
    if (!child) return self->deny("this server is out of resources; try again later", child.error().doing);
    self->session_pid_ = child->pid;
    static const std::string own_cgroup = cgroup_of(::getpid());  // where our zygotes and so the sessions are born
    self->cgroup_ = own_cgroup;
    self->session_watch_ = std::make_unique<boost::asio::posix::stream_descriptor>(self->broker_.io(), child->pidfd.release());
    self->session_ = std::make_unique<LocalSocket>(self->broker_.io().get_executor(), std::move(*end), session::version, 64 * 1024);
    self->watch_session();
    session::Lookup lookup;
    if (!lookup.name.set(self->verdict_.local_user)) return self->deny("this user name is too long", "name_too_long");
    self->session_->send(static_cast<std::uint16_t>(session::Type::lookup), lookup);
  });
}

void Connection::listen_to_session() {
  session_->start([weak = weak_from_this()](Message m) { if (const auto self = weak.lock()) self->on_session(std::move(m)); },
                  [weak = weak_from_this()](const std::string& why) {
                    const auto self = weak.lock();
                    // Once denied, a session that ends must not take net with it: it still has the reason to show.
                    if (self && !self->granted_ && self->phase_ != Phase::ending) self->break_off("the session process: " + why);
                  });
}

void Connection::session_returns(std::unique_ptr<LocalSocket> socket) {
  spdlog::info("event=session_registered connection={} again=1", id_);
  session_ = std::move(socket);
  listen_to_session();
  re_evaluate();
}

void Connection::watch_session() {
  listen_to_session();
  when_ended(&Connection::session_watch_, &Connection::session_ended);
}

void Connection::session_ended() {
  session_pid_ = -1;
  if (phase_ == Phase::ending && !granted_) return;
  if (!granted_) return break_off("the session process ended");
  kill_net();  // without a session there is nobody to serve it
  // One that ended by itself left an empty leaf, or none. What is still in it lost its session by a crash: nobody could end it later.
  kill_programs(id_, cgroup_, -1);
  over();
}

void Connection::start_registered() {
  spdlog::info("event=session_registered connection={} peer={} node={} local_user={}", id_, peer_.text(), safe_quoted(facts_.node_name.get()),
               safe_quoted(facts_.local_user.get()));
  session_pid_ = pid_of(session_watch_->native_handle()).value_or(-1);
  net_pid_ = pid_of(net_pidfd_.get()).value_or(-1);
  if (session_pid_ > 0) cgroup_ = cgroup_of(session_pid_);
  watch_net();
  watch_session();
}

void Connection::on_session(Message message) {
  const auto type = static_cast<session::Type>(message.type);
  if (!message.fds.empty()) return break_off("session sent a descriptor");
  switch (type) {
    case session::Type::user:
      if (const auto user = message.body<session::User>(); user && user->name.valid() && phase_ == Phase::looking_up) return found(*user);
      break;
    case session::Type::ready:
      if (const auto r = message.body<session::Ready>(); r && r->text.valid() && phase_ == Phase::opening && !session_answered_) return opened(*r);
      break;
    case session::Type::ask_sign:
      if (const auto ask = message.body<net::AskSign>(); ask && ask->data.valid() && authenticated()) {
        spdlog::debug("event={} connection={}", ask->purpose == net::Purpose::possession ? "host_key_proof" : "rekey", id_);
        const auto now = std::chrono::steady_clock::now();
        sign_tokens_ = std::min(sign_bucket, sign_tokens_ + std::chrono::duration<double>(now - sign_refilled_).count() * sign_per_second);
        sign_refilled_ = now;
        const auto answer = [weak = weak_from_this()](const std::string& blob) {
          const auto self = weak.lock();
          if (!self || !self->session_) return;
          net::Signature s;
          (void)s.blob.set(blob);
          self->session_->send(static_cast<std::uint16_t>(session::Type::signature), s);
        };
        if (sign_tokens_ < 1 - sign_debt) {
          spdlog::warn("event=sign_refused connection={} why=too_often", id_);
          return answer({});
        }
        sign_tokens_ -= 1;
        if (sign_tokens_ >= 0) return broker_.keys().sign(*ask, facts_.exchange_hash.get(), broker_.io().get_executor(), weak_from_this(), answer);
        const auto later = std::make_shared<boost::asio::steady_timer>(broker_.io(), std::chrono::milliseconds{static_cast<int>(-sign_tokens_ / sign_per_second * 1000)});
        later->async_wait([later, weak = weak_from_this(), request = *ask, answer](boost::system::error_code ec) {
          const auto self = weak.lock();
          if (!ec && self && !self->done_) self->broker_.keys().sign(request, self->facts_.exchange_hash.get(), self->broker_.io().get_executor(), weak, answer);
        });
        return;
      }
      break;
    case session::Type::channels:
      if (const auto c = message.body<session::Channels>(); c && authenticated()) {
        channels_ = c->open;
        return;
      }
      break;
    case session::Type::event:
      if (const auto e = message.body<session::Event>(); e && e->name.valid() && e->fields.valid()) {
        spdlog::info("event={} connection={} {}", e->name.get(), id_, e->fields.get());
        return;
      }
      break;
    default:
      break;
  }
  break_off("session sent message " + std::to_string(message.type) + " out of order");
}

void Connection::found(const session::User& user) {
  const Node* destination = broker_.self(local_.address);
  if (user.found == 0) {
    // The same sentence as for a name that the policy does not permit: nobody learns who has an account.
    return deny(auth::policy::denial_text(auth::policy::Denial::user_not_permitted, ssh_user_), "no_such_account");
  }
  if (user.name.get() != verdict_.local_user) return deny(auth::policy::denial_text(auth::policy::Denial::user_not_permitted, ssh_user_), "account_has_another_name");
  if (destination == nullptr) return deny("the network does not know this server's address", "server_address_unknown");
  // As an ordinary user "uid 0" reads as "the uid that runs posternd", and only that uid can log in.
  if (!let_in(decide(source_, *destination, user.uid))) return;

  const Config& c = broker_.config();
  bool fits = facts_.peer_address.set(peer_.address.text()) && facts_.server_address.set(local_.address.text()) && facts_.node_id.set(source_.id) &&
              facts_.node_name.set(source_.name) && facts_.login.set(source_.login) && facts_.tags.set(join(source_.tags)) &&
              facts_.server_node_id.set(destination->id) && facts_.rule.set(verdict_.rule.text()) && facts_.ssh_user.set(ssh_user_) &&
              facts_.local_user.set(verdict_.local_user) && facts_.recorder_tag.set(verdict_.recorder_tag) && facts_.relay_socket.set(c.relay.socket) &&
              facts_.registration_socket.set(c.control.registration_socket) && facts_.pam_service.set(c.pam.service) &&
              facts_.pam_confdir.set(c.pam.confdir) && facts_.sftp_server.set(c.session.sftp_server) && verdict_.accept_env.size() <= max_accept_env &&
              write_rules(rules_, facts_.rules) && write_forwarding(rules_, verdict_.enforce_recorder, facts_.forwarding) && facts_.xauth.set(c.forwarding.xauth);
  facts_.accepted_at = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  facts_.policy_version = broker_.rules().version();
  facts_.peer_port = peer_.port;
  facts_.server_port = local_.port;
  facts_.uid = user.uid;
  facts_.record = verdict_.record;
  facts_.enforce_recorder = verdict_.enforce_recorder;
  for (const auto& node : verdict_.recorders) {
    if (node.addresses.empty() || facts_.recorder_count == max_recorders) continue;
    const Address lowest = *std::min_element(node.addresses.begin(), node.addresses.end());
    fits = fits && facts_.recorders[facts_.recorder_count++].set(Endpoint{lowest, c.recorder.port}.text());
  }
  for (const auto& glob : verdict_.accept_env)
    if (fits) fits = facts_.accept_env[facts_.accept_env_count++].set(glob);
  facts_.sessions_per_connection = c.limits.sessions_per_connection;
  facts_.gateway_ports = c.forwarding.gateway_ports == "clientspecified";
  facts_.unlink_sockets = c.forwarding.unlink_sockets;
  facts_.forwards_per_connection = c.limits.forwards_per_connection;
  facts_.forward_connect_ms = static_cast<std::uint32_t>(c.forwarding.connect_timeout.count());
  facts_.kill_on_disconnect = c.session.on_disconnect == "kill" ? 1 : 0;
  facts_.hang_up_ms = static_cast<std::uint32_t>(c.session.hang_up_time.count());
  facts_.farewell_ms = static_cast<std::uint32_t>(c.session.farewell_time.count());
  facts_.kill_ms = static_cast<std::uint32_t>(c.session.kill_time.count());
  facts_.sign_ms = static_cast<std::uint32_t>(c.ssh.sign_timeout.count());
  facts_.orphan_limit_seconds = static_cast<std::uint32_t>(c.session.orphan_limit.count());
  facts_.recorder_grace_ms = static_cast<std::uint32_t>(c.recorder.grace.count());
  facts_.recorder_start_ms = static_cast<std::uint32_t>(c.recorder.start_timeout.count());
  if (!fits) return deny("this login cannot be described to the session; ask the administrator", "facts_too_long");

  auto memfd = seal_facts(facts_);
  auto pair = seqpacket_pair(256 * 1024);
  const int pidfd = ::fcntl(net_pidfd_.get(), F_DUPFD_CLOEXEC, 3);
  if (!memfd || !pair || pidfd < 0) return deny("this server is out of resources; try again later", "no_descriptors");
  net_end_ = std::move(pair->second);
  phase_ = Phase::opening;
  std::vector<UniqueFd> fds;
  fds.push_back(std::move(*memfd));
  fds.push_back(std::move(pair->first));
  fds.emplace_back(pidfd);
  session_->send(static_cast<std::uint16_t>(session::Type::grant), session::Grant{}, std::move(fds));
}

void Connection::opened(const session::Ready& answer) {
  session_answered_ = true;
  if (answer.ok == 0) return deny(std::string{answer.text.get()}, "account");
  session_ready_ = true;
  const bool judged_before = generation_ != broker_.generation();
  when_still_the_same([self = shared_from_this(), judged_before] {
    // The facts are sealed: a reload that makes another answer of it cannot be followed, only refused.
    if (judged_before)
      if (const auto why = self->difference(self->source_); !why || !why->empty())
        return self->deny("the policy changed while you connected; connect again", why.value_or("source_unavailable"));
    self->accept();
  });
}

void Connection::accept() {
  granted_ = true;
  phase_ = Phase::live;
  grace_.cancel();
  uncount();
  broker_.forgive(counted_as_);
  const auto took = std::chrono::duration_cast<std::chrono::microseconds>(std::chrono::steady_clock::now() - accepted_at_).count();
  std::string rules;  // names only: a forced command is a command line
  for (const auto& [name, value] : rules_.members()) rules += (rules.empty() ? "" : ",") + name;
  spdlog::info("event=login verdict=accept connection={} peer={} node={} user={} tags={} ssh_user={} local_user={} rule={} record={} enforce={} session_rules={} client={} us={}", id_,
               peer_.text(), safe_quoted(source_.name), safe_quoted(source_.login), safe_quoted(join(source_.tags)), safe_quoted(ssh_user_), safe_quoted(verdict_.local_user),
               safe_quoted(verdict_.rule.text()), verdict_.record, verdict_.enforce_recorder, rules, safe_quoted(client_version_), took);
  tell("login", "accept", {});
  net::Verdict verdict;
  verdict.accepted = 1;
  std::vector<UniqueFd> fds;
  fds.push_back(std::move(net_end_));
  net_->send(static_cast<std::uint16_t>(net::Type::verdict), verdict, std::move(fds));
  // net closes its end when it has the verdict; ours follows then. Closing first could lose the message (unix(7): a close with
  // unread data resets the peer).
}

void Connection::deny(const std::string& text, const std::string& why) {
  spdlog::info("event=login verdict=deny connection={} peer={} node={} user={} tags={} ssh_user={} why={} client={}", id_, peer_.text(), safe_quoted(source_.name),
               safe_quoted(source_.login), safe_quoted(join(source_.tags)), safe_quoted(ssh_user_), safe_quoted(why), safe_quoted(client_version_));
  tell("login", "deny", why);
  if (is_an_answer(why)) punish(Offence::auth_failed);
  if (session_ && session_ready_) {
    // It has opened PAM's session by now: it ends as a revoked one does.
    session::Revoke body;
    (void)body.text.set("Access revoked.");
    session_->send(static_cast<std::uint16_t>(session::Type::revoke), body);
  } else if (session_ && !session_answered_) {
    session_->send_empty(static_cast<std::uint16_t>(session::Type::deny));
  }
  phase_ = Phase::ending;
  net::Verdict verdict;
  if (!verdict.text.set(text)) (void)verdict.text.set("access denied");
  if (net_) net_->send(static_cast<std::uint16_t>(net::Type::verdict), verdict);
  // net shows it and ends; one that does not is ended.
  end_timer_.expires_after(broker_.config().limits.refusal_time + 1s);
  end_timer_.async_wait([self = shared_from_this()](boost::system::error_code ec) {
    if (!ec) self->break_off("a denied client stayed");
  });
}

void Connection::break_off(const std::string& why) {
  if (done_) return;
  // Not said by net, which may lie about its client: known here is that the question never came.
  if (phase_ == Phase::handshake && ssh_user_.empty()) {
    const bool in_time = std::chrono::steady_clock::now() - accepted_at_ < broker_.config().limits.login_grace_time;
    punish(!in_time ? Offence::grace_exceeded : signed_once_ ? Offence::key_scan : Offence::no_auth);
  }
  if (phase_ != Phase::ending) spdlog::info("event=connection_ended connection={} peer={} phase={} why={}", id_, peer_.text(), static_cast<int>(phase_), safe_quoted(why));
  if (granted_) return revoke("The connection was ended by the server.", why);
  kill_net();
  over();
}

void Connection::kill_net() {
  if (!net_pidfd_) return;
  pidfd_signal(net_pidfd_.get(), SIGKILL);
}

void Connection::revoke(const std::string& text, const std::string& why) {
  if (done_ || phase_ == Phase::ending) return;
  if (!granted_) return break_off(why);
  spdlog::info("event=revoked connection={} peer={} node={} local_user={} why={}", id_, peer_.text(), safe_quoted(facts_.node_name.get()),
               safe_quoted(facts_.local_user.get()), safe_quoted(why));
  tell("revoked", "", why);
  phase_ = Phase::ending;
  session::Revoke body;
  const auto clear_up = broker_.count_revocation();
  body.clear_up_ms = static_cast<std::uint32_t>(clear_up.count());
  (void)body.text.set(text);
  session_->send(static_cast<std::uint16_t>(session::Type::revoke), body);
  end_timer_.expires_after(broker_.config().session.farewell_time + farewell_slack);
  end_timer_.async_wait([self = shared_from_this(), clear_up](boost::system::error_code ec) {
    if (ec || self->done_) return;
    self->kill_net();
    self->end_timer_.expires_after(self->broker_.config().session.kill_time + clear_up + programs_slack);
    self->end_timer_.async_wait([self](boost::system::error_code late) {
      if (late || self->done_) return;
      const auto kill = [self](const char* fault) {
        spdlog::error("event=session_killed connection={} why={}", self->id_, fault);
        self->kill_session();
      };
      if (has_programs(self->id_, self->cgroup_, self->session_pid_)) return kill("it_did_not_end_its_programs");
      // They have ended; it waits for a relay to take the end of its recordings.
      spdlog::info("event=session_waited_for connection={}", self->id_);
      self->end_timer_.expires_after(recording_slack);
      self->end_timer_.async_wait([self, kill](boost::system::error_code again) {
        if (!again && !self->done_) kill("it_did_not_end");
      });
    });
  });
}

void Connection::re_evaluate() {
  if (done_ || !granted_ || phase_ != Phase::live || cut_off_) return;
  broker_.provider().who_is(peer_, [self = shared_from_this()](Expected<std::optional<Node>> answer) {
    if (self->done_ || self->phase_ != Phase::live) return;
    if (!answer && answer.error().code == EAGAIN) return self->broker_.ask_again(self);  // live sessions go on
    if (!answer) return self->cut_off("the network no longer stands for it: " + answer.error().doing);
    if (!*answer) return self->cut_off("the network no longer knows this address");
    const auto why = self->difference(**answer);
    if (!why) return self->broker_.ask_again(self);
    if (!why->empty()) self->cut_off(*why);
  });
}

void Connection::cut_off(std::string why) {
  if (!std::exchange(cut_off_, true)) broker_.cut_off(shared_from_this(), std::move(why));
}

std::optional<std::string> Connection::difference(const Node& node) const {
  const ConnectionFacts& f = facts_;
  if (node.id != f.node_id.get() || node.login != f.login.get() || node.tags != split(f.tags.get())) return "another node, user or tags at this address";
  const Node* destination = broker_.self(local_.address);
  if (destination == nullptr && broker_.provider().own_addresses().empty()) return std::nullopt;  // away since it answered
  if (destination == nullptr || destination->id != f.server_node_id.get()) return "this server's node changed";
  const auto decision = decide(node, *destination, f.uid);
  if (!decision.unavailable.empty()) return std::nullopt;
  const auto& verdict = decision.verdict;
  if (verdict.outcome != auth::policy::Outcome::accept) return "the policy no longer allows it";
  if (verdict.local_user != f.local_user.get()) return "the policy maps to another account";
  const RecordingTerms now{verdict.record, verdict.enforce_recorder, verdict.recorder_tag};
  const RecordingTerms then{f.record != 0, f.enforce_recorder != 0, std::string{f.recorder_tag.get()}};
  if (now != then) return "the policy's rule on recording changed";
  const auto rules = effective_rules(verdict.session_rules, node, broker_.config());
  if (!rules) return "what the network says of its sessions cannot be read: " + rules.error().doing;
  ConnectionFacts::Rules today;
  if (rules->command_conflict || !write_rules(*rules, today) || today != f.rules) return "its session rules changed";
  ConnectionFacts::Forwarding forwarding;
  if (!write_forwarding(*rules, verdict.enforce_recorder, forwarding) || forwarding != f.forwarding) return "its session rules on forwarding changed";
  // One that takes more keeps what it began with.
  for (std::uint32_t i = 0; i < f.accept_env_count; i++)
    if (std::find(verdict.accept_env.begin(), verdict.accept_env.end(), f.accept_env[i].get()) == verdict.accept_env.end()) return "the policy's rule on variables changed";
  return "";
}

void Connection::kill_session() {
  if (!session_watch_) return;
  // Its programs first: while it lives the kernel still says which ones are its own.
  const pid_t session = pid_of(session_watch_->native_handle()).value_or(-1);
  pidfd_signal(session_watch_->native_handle(), SIGSTOP);
  kill_programs(id_, cgroup_, session);
  pidfd_signal(session_watch_->native_handle(), SIGKILL);
}

void Connection::abandon() {
  if (!granted_) {
    kill_net();
    over();
  }
}

void Connection::uncount() {
  if (std::exchange(counted_, false)) broker_.no_longer_unauthenticated(counted_as_);
}

void Connection::punish(Offence offence) { broker_.punish(peer_.address, counted_as_, offence); }

void Connection::tell(const char* event, const char* verdict, const std::string& why, const std::string& detail) {
  const auto text = [](const auto& fact) { return std::string{fact.get()}; };
  const bool sealed = granted_;  // then the facts say it, also for a session of an earlier broker
  const std::string ssh_user = ssh_user_ == std::string(1, '\0') ? std::string{} : ssh_user_;
  broker_.audit().tell(event, {{"verdict", verdict},
                               {"why", why},
                               {"detail", detail},
                               {"connection", id_},
                               {"peer", peer_.text()},
                               {"server", local_.text()},
                               {"node", sealed ? text(facts_.node_name) : source_.name},
                               {"node_id", sealed ? text(facts_.node_id) : source_.id},
                               {"user", sealed ? text(facts_.login) : source_.login},
                               {"tags", sealed ? text(facts_.tags) : join(source_.tags)},
                               {"ssh_user", ssh_user},
                               {"local_user", sealed ? text(facts_.local_user) : verdict_.local_user},
                               {"rule", sealed ? text(facts_.rule) : verdict_.rule.line > 0 ? verdict_.rule.text() : std::string{}},
                               {"recorded", sealed && facts_.record != 0 ? "yes" : ""},
                               {"client", client_version_}});
  if (std::string_view{event} == "login") broker_.audit().user_login(sealed ? text(facts_.local_user) : ssh_user, peer_.address.text(), sealed);
}

void Connection::over() {
  if (done_) return;
  done_ = true;
  uncount();
  grace_.cancel();
  end_timer_.cancel();
  boost::system::error_code ignored;
  if (net_watch_) net_watch_->close(ignored);
  if (session_watch_) session_watch_->close(ignored);
  if (net_) net_->close();
  if (session_) session_->close();
  if (granted_) {
    const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::steady_clock::now() - accepted_at_).count();
    spdlog::info("event=connection_closed connection={} peer={} local_user={} seconds={}", id_, peer_.text(), safe_quoted(facts_.local_user.get()), seconds);
    tell("closed", "", {});
  }
  broker_.remove(this);
}

}  // namespace postern::sshd::broker
