// The tailscaled provider: who is at an address, as the daemon that runs the network says (Tailscale, Headscale).
//
// whois answers every question; status gives the network as policies see it; watch-ipn-bus only says that something changed, never what
// (shared/research/lab-tailnet.md section 3 d). Nothing is kept over a change, and without the bus nothing is answered at all: an answer is
// never older than the last notice.
#include "auth/identity/identity.h"
#include "auth/identity/localapi.h"
#include "auth/identity/tailscaled.h"
#include "base/log.h"

#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>

#include <algorithm>
#include <map>
#include <utility>

namespace postern::auth::identity {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using error_code = boost::system::error_code;

/// 2: the state first; 4096, 32768: peers' changes, as patches where they are such (ipn/backend.go, NotifyWatchOpt).
constexpr const char* bus_target = "/localapi/v0/watch-ipn-bus?mask=36866";
/// 8: the whole network map, once, with the ssh rules in it.
constexpr const char* netmap_target = "/localapi/v0/watch-ipn-bus?mask=8";
/// Between two looks, when notices come in a stream.
constexpr auto least_pause = 100ms;
constexpr auto first_retry = 50ms, last_retry = 500ms;
/// An answer of whois serves who asks for the same address meanwhile: the live connections that are looked at again after a change.
constexpr auto answers_serve = 1s;
constexpr std::size_t most_answers = 64 * 1024;
constexpr auto tell_away_every = 60s;
/// A tailscaled that gave no network map is asked again without a notice.
constexpr auto rules_again = 5s;
/// Of the time in which a look at a large network keeps everything else waiting: it is at most a quarter.
constexpr int pause_per_look = 3;
/// From and to which tailscaled's proxy connects (wgengine/netstack).
const Address proxy_address = *Address::parse("127.0.0.1");

class Tailscaled : public Provider {
 public:
  Tailscaled(boost::asio::io_context& io, TailscaledSettings settings)
      : io_{io}, settings_{std::move(settings)}, api_{io, settings_.socket, settings_.timeout}, retry_{io}, look_{io}, rules_time_{io}, expiry_{io} {}
  ~Tailscaled() override { *alive_ = false; }

  void start(std::function<void(Expected<Done>)> ready, std::function<void()> changed) override {
    ready_ = std::move(ready);
    changed_ = std::move(changed);
    connect();
  }

  void who_is(const Endpoint& peer, Answer answer) override {
    if (!known_) return answer(Unexpected{unavailable()});
    if (!status_.running()) return answer(Unexpected{Error{EAGAIN, "tailscaled is not connected to its network: " + safe_quoted(status_.state, 40)}});
    const bool proxied = !status_.tun;
    // Without a TUN device the kernel knows nothing of the network: any machine nearby could have such an address.
    if (proxied && peer.address != proxy_address) return answer(std::optional<Node>{});
    const Endpoint who{peer.address, proxied ? peer.port : std::uint16_t{0}};
    // An answer by port is good for that one connection: whoever has the port next is somebody else.
    const std::uint64_t turn = proxied ? by_port | by_port_++ : epoch_;
    if (const auto it = answers_.find(who); !proxied && it != answers_.end() && it->second.until > Clock::now()) return answer(it->second.answer);
    auto& waiting = asking_[{turn, who}];
    waiting.push_back(std::move(answer));
    if (waiting.size() > 1) return;
    LocalApi::Question question;
    // By address alone wherever that is enough: a port that tailscaled's proxy does not know holds up all of tailscaled.
    question.target = "/localapi/v0/whois?" + (proxied ? "proto=tcp&addr=" + who.text() : "addr=" + who.address.text());
    question.limit = max_whois_bytes;
    question.answer = [this, who, turn](Expected<LocalApi::Answer> got) { answered(who, turn, std::move(got)); };
    api_.ask(std::move(question));
  }

  bool behind_proxy() const override { return !status_.tun; }
  std::optional<uid_t> proxy_user() const override { return api_.peer_user(); }
  const Network& network() const override { return status_.network; }
  std::vector<Address> own_addresses() const override { return status_.own_addresses; }
  Expected<std::string> ssh_policy() const override { return ssh_policy_; }
  void clock_changed() override {
    if (bus_) look_soon();  // keys may have expired
  }
  Expected<Done, std::vector<Problem>> reload() override {
    if (bus_) look_soon();
    return Done{};
  }

 private:
  struct Known {
    Expected<std::optional<Node>> answer;
    Clock::time_point until;
  };

  Error unavailable() const { return Error{EAGAIN, why_unknown_}; }

  // ---- the connection to tailscaled: preferences, then the bus, then status

  void connect() {
    LocalApi::Question question;
    question.target = "/localapi/v0/prefs";
    question.limit = max_prefs_bytes;
    question.answer = [this](Expected<LocalApi::Answer> got) {
      const auto run_ssh = got && got->status == 200 ? read_run_ssh(got->body) : Expected<bool>{Unexpected{got ? Error{EAGAIN, "prefs: status " + std::to_string(got->status)} : got.error()}};
      if (!run_ssh) return lost(run_ssh.error().doing);
      if (*run_ssh && ready_ && settings_.server) {
        return std::exchange(ready_, nullptr)(Unexpected{Error{EBUSY, "Tailscale SSH is on for this machine, and takes port 22 of its addresses before posternd sees a connection. Turn it "
                                                                      "off: tailscale set --ssh=false"}});
      }
      ssh_on(*run_ssh);
      watch();
    };
    api_.ask(std::move(question));
  }

  void ssh_on(bool on) {
    if (on && settings_.server && !std::exchange(warned_, true))
      spdlog::error("event=tailscale_ssh_is_on why=\"Tailscale SSH was turned on and takes port 22 of this machine's addresses; turn it off: tailscale set --ssh=false\"");
    warned_ = on;
  }

  void watch() {
    bus_ = std::make_unique<LineStream>(io_, settings_.socket, bus_target, max_bus_line_bytes, settings_.timeout,
                                        LineStream::Handlers{[this] { look_soon(); }, [this](std::string_view line) { noticed(line); },
                                                             [this](const Error& error) { lost(error.doing); }});
  }

  void lost(const std::string& why) {
    why_unknown_ = "tailscaled: " + why;
    // Until it is back nothing ends what the network has taken away: that is said again and again.
    if (const auto now = Clock::now(); known_ || first_ || now - told_away_ >= tell_away_every) {
      spdlog::error("event=tailscaled_away why={}", safe_quoted(why, 400));
      told_away_ = now;
    }
    first_ = false;
    known_ = false;
    new_epoch();
    look_.cancel();
    looking_ = false;
    look_again_ = false;
    netmap_.reset();
    rules_time_.cancel();
    be_ready();
    retry_.expires_after(pause_);
    pause_ = std::min<std::chrono::milliseconds>(pause_ * 2, last_retry);
    retry_.async_wait([this, alive = alive_](error_code ec) {
      if (ec || !*alive) return;
      bus_.reset();
      connect();
    });
  }

  void noticed(std::string_view line) {
    const auto read = read_bus_line(line);
    if (!read) return lost(read.error().doing), bus_.reset();
    if (*read) ssh_on(**read);
    look_soon();
  }

  // ---- a look at everything: at the start and after each notice

  /// What was answered so far no longer counts.
  void new_epoch() {
    epoch_++;
    answers_.clear();
  }

  void look_soon() {
    new_epoch();
    if (looking_) {
      look_again_ = true;
      return;
    }
    looking_ = true;
    const auto now = Clock::now();
    const auto when = std::max(now, last_look_ + std::max<Clock::duration>(least_pause, look_took_ * pause_per_look));
    if (when <= now) return look();
    look_.expires_at(when);
    look_.async_wait([this, alive = alive_](error_code ec) {
      if (!ec && *alive && looking_) look();
    });
  }

  void look() {
    last_look_ = Clock::now();
    look_again_ = false;
    LocalApi::Question question;
    question.target = "/localapi/v0/status";
    question.limit = max_status_bytes;
    question.first = true;
    question.answer = [this, n = ++look_number_](Expected<LocalApi::Answer> got) {
      if (n != look_number_ || !looking_) return;
      const auto begin = Clock::now();
      auto status = got && got->status == 200 ? read_status(got->body, settings_.shared_users)
                                              : Expected<TailscaledStatus>{Unexpected{got ? Error{EAGAIN, "status: " + std::to_string(got->status)} : got.error()}};
      look_took_ = Clock::now() - begin;
      last_look_ = begin;
      if (!status) return lost(status.error().doing), bus_.reset();
      next_ = std::move(*status);
      if (!settings_.ssh_policy || !next_.running()) return looked();
      look_at_rules();
    };
    api_.ask(std::move(question));
  }

  void look_at_rules() {
    const auto end = [this](Expected<std::string> rules) {
      // Not from within its own handler's frame of the stream that is asked for.
      boost::asio::post(io_, [this, alive = alive_, rules = std::move(rules)]() mutable {
        if (!*alive || !netmap_) return;
        netmap_.reset();
        rules_time_.cancel();
        // Whatever may pass is tried again, as for the status.
        if (!rules && rules.error().code == EAGAIN) return lost(rules.error().doing), bus_.reset();
        ssh_policy_ = std::move(rules);
        looked();
        if (ssh_policy_) return;
        rules_time_.expires_after(rules_again);
        rules_time_.async_wait([this, alive = alive_](error_code ec) {
          if (!ec && *alive && bus_) look_soon();
        });
      });
    };
    const auto none = [end] {
      end(Unexpected{Error{ENOTSUP, "this tailscaled does not tell the network's ssh rules",
                           "This server's tailscaled no longer tells it the network's ssh rules; ask the administrator."}});
    };
    // The stream itself may be silent for ever between its lines, and a tailscaled that no longer sends its map has none.
    rules_time_.expires_after(settings_.timeout);
    rules_time_.async_wait([none, alive = alive_](error_code ec) {
      if (!ec && *alive) none();
    });
    netmap_ = std::make_unique<LineStream>(
        io_, settings_.socket, netmap_target, max_netmap_bytes, settings_.timeout,
        LineStream::Handlers{[] {},
                             [end, none, done = std::make_shared<bool>(false)](std::string_view line) {
                               if (*done) return;
                               const auto rules = read_ssh_policy(line, true);
                               if (rules && !*rules && line.find("\"NetMap\":{") == std::string_view::npos) return;  // the greeting, before the map
                               *done = true;
                               if (!rules) return end(Unexpected{rules.error()});
                               if (!*rules) return none();
                               end(**rules);
                             },
                             [end](Error error) { end(Unexpected{std::move(error)}); }});
  }

  void looked() {
    looking_ = false;
    status_ = std::move(next_);
    if (!known_) spdlog::info("event=tailscaled_here state={} nodes={} tun={}", safe_quoted(status_.state, 40), status_.network.nodes.size(), status_.tun);
    if (!status_.tun) {
      // Its proxy takes what comes for the network's addresses to the same port here.
      status_.own_addresses = {proxy_address};
      for (auto& node : status_.network.nodes)
        if (node.id == status_.own_id) node.addresses.push_back(proxy_address);
      status_.network.index();
    }
    known_ = true;
    first_ = false;
    pause_ = first_retry;
    wait_for_expiry();
    if (look_again_) look_soon();
    if (!be_ready()) changed_();
  }

  bool be_ready() {
    if (!ready_) return false;
    std::exchange(ready_, nullptr)(Done{});
    return true;
  }

  /// A key that expires is told by nobody.
  void wait_for_expiry() {
    expiry_.cancel();
    const WallTime now = std::chrono::system_clock::now();
    std::optional<WallTime> next;
    for (const auto& t : status_.key_expiries)
      if (t > now && (!next || t < *next)) next = t;
    if (!next) return;
    // A steady clock's timer; a step of the wall clock is met by the hourly look.
    expiry_.expires_after(std::min<WallTime::duration>(*next - now, 1h) + 1ms);
    expiry_.async_wait([this, alive = alive_](error_code ec) {
      if (!ec && *alive && bus_) look_soon();
    });
  }

  void answered(const Endpoint& who, std::uint64_t turn, Expected<LocalApi::Answer> got) {
    const auto at = asking_.find({turn, who});
    if (at == asking_.end()) return;
    const auto waiting = std::move(at->second);
    asking_.erase(at);
    Expected<std::optional<Node>> answer = std::optional<Node>{};
    if (!got) {
      answer = Unexpected{got.error()};
      // That passes no more than other things that a node may have said of itself.
      if (got.error().code == E2BIG) answer.error().user_message = "What the network says of your machine is too long.";
    } else if (got->status == 200) {
      auto read = read_whois(got->body, who.port == 0 ? std::optional{who.address} : std::nullopt, {.own_id = status_.own_id, .shared_users = settings_.shared_users, .now = std::chrono::system_clock::now()});
      if (read) answer = std::optional{std::move(read->node)};
      else answer = Unexpected{std::move(read.error())};
    } else if (got->status != 404) {  // 404: it is in no node
      answer = Unexpected{Error{EAGAIN, "asking tailscaled for whois: status " + std::to_string(got->status)}};
    }
    // One of before a change is told to those who asked before it; they will be looked at again.
    const bool sure = got && (answer || answer.error().code != EAGAIN);
    if (turn == epoch_ && known_ && sure && answers_.size() < most_answers) answers_.insert_or_assign(who, Known{answer, Clock::now() + answers_serve});
    const auto alive = alive_;
    for (const auto& call : waiting) {
      if (!*alive) return;
      call(answer);
    }
  }

  boost::asio::io_context& io_;
  const TailscaledSettings settings_;
  std::shared_ptr<bool> alive_ = std::make_shared<bool>(true);
  LocalApi api_;
  std::unique_ptr<LineStream> bus_, netmap_;
  boost::asio::steady_timer retry_, look_, rules_time_, expiry_;
  std::function<void(Expected<Done>)> ready_;
  std::function<void()> changed_;

  TailscaledStatus status_, next_;
  Expected<std::string> ssh_policy_ = Unexpected{Error{EAGAIN, "tailscaled was not asked for the network's ssh rules yet"}};
  std::string why_unknown_ = "tailscaled has not answered yet";
  bool known_ = false;  ///< status_ is of now
  bool first_ = true;   ///< nothing was heard of it so far
  bool warned_ = false;
  std::chrono::milliseconds pause_ = first_retry;
  Clock::time_point last_look_{}, told_away_{};
  Clock::duration look_took_{};
  std::uint64_t look_number_ = 0;
  bool looking_ = false, look_again_ = false;

  std::uint64_t epoch_ = 0;  ///< counts notices
  static constexpr std::uint64_t by_port = std::uint64_t{1} << 63;
  std::uint64_t by_port_ = 0;  ///< counts questions about one connection
  std::map<Endpoint, Known> answers_;
  std::map<std::pair<std::uint64_t, Endpoint>, std::vector<Answer>> asking_;
};

}  // namespace

std::unique_ptr<Provider> make_tailscaled_provider(boost::asio::io_context& io, TailscaledSettings settings) {
  return std::make_unique<Tailscaled>(io, std::move(settings));
}

}  // namespace postern::auth::identity
