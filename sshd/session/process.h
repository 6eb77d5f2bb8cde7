#pragma once

#include "auth/pam/pam.h"
#include "base/poller.h"
#include "base/unique_fd.h"
#include "pty/become_user.h"
#include "sshd/protocol/channel.h"
#include "sshd/protocol/facts.h"
#include "sshd/protocol/net.h"
#include "sshd/protocol/session.h"
#include "sshd/session/channel.h"
#include "sshd/session/forwarding.h"
#include "sshd/session/holder.h"
#include "sshd/session/limits.h"
#include "sshd/session/outbox.h"
#include "sshd/session/tree.h"

#include <chrono>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace postern::sshd::session {

/// Bucket of sign requests that we forward for net: one a rekey. OpenSSH rekeys every GiB; 1 s a piece is 1 GiB/s.
inline constexpr unsigned sign_burst = 8;
inline constexpr std::chrono::milliseconds sign_refill{500};  ///< the broker's rate
/// Channel counts go to the broker no more often.
inline constexpr std::chrono::milliseconds channels_interval{50};
/// No process for close_elsewhere(): tried again after so long.
inline constexpr std::chrono::milliseconds bury_retry{100};
inline constexpr std::chrono::milliseconds register_first_retry{200};
inline constexpr std::chrono::milliseconds register_last_retry{1'000};

/// One allowed connection's privileged process: PAM, its channels, its recordings, its end.
///
/// Trusts the broker (and still checks sizes and order); takes every message of net as hostile. Runs until the client, the broker's
/// word, or the loss of both ends it; then hangs up or kills the programs, ends the recordings, closes PAM, in this order.
class SessionProcess {
 public:
  SessionProcess(UniqueFd broker, bool as_root);
  ~SessionProcess();
  SessionProcess(const SessionProcess&) = delete;
  SessionProcess& operator=(const SessionProcess&) = delete;

  /// Runs to the end; exit status of the process.
  int run();

 private:
  using Clock = Poller::Clock;
  enum class Phase { new_born, looked_up, granted, leaving };

  // The broker.
  void read_broker();
  bool on_broker_message(Message& m);
  void look_up(const session::Lookup& lookup);
  bool take_facts(int memfd);
  bool on_grant(Message& m);
  Expected<Done> check_account();
  bool open_pam_session();
  void lost_broker();
  void try_register();
  void schedule_register();
  void event(const std::string& name, const std::string& fields);
  void tell_channels();

  // net
  void read_net();
  bool on_net_message(const Message& m);
  void begin_forwarding();
  bool hold(const Message& m, bool& held);
  void answer_held(std::uint32_t number, bool ok);
  void violation(const std::string& what);
  void begin_limits();
  bool may_sign();
  void forward_sign_requests();
  void refuse_signature();
  SessionChannel* find(std::uint32_t number);
  void kill_net();

  // The end.
  void net_gone();
  void end_tree();
  void revoke(std::string_view text, std::chrono::milliseconds clear_up = {});
  void hold_still(Clock::time_point farewell, Clock::time_point until);
  void recorder_lost();
  void watch_tree();
  void reap();
  void let_go(UniqueFd fd, bool delivered);
  void bury(bool at_the_end);
  void sweep();
  bool done() const;

  Poller poller_;
  const bool as_root_;
  Phase phase_ = Phase::new_born;
  std::vector<UniqueFd> doomed_;  // for close_elsewhere(); before those that let go
  UniqueFd parted_;               // net's socket after its end: a process that exits does not linger, and needs no other one to close it
  Outbox broker_;
  Outbox net_;
  UniqueFd signals_;
  UniqueFd facts_fd_, net_pidfd_, own_pidfd_;

  pty::LocalUser user_;
  bool found_ = false;
  ConnectionFacts facts_;
  std::unique_ptr<auth::pam::PamSession> pam_;
  std::vector<std::string> pam_environment_;
  std::string pam_texts_;
  std::optional<pty::ProcessSettings> user_settings_;
  std::unique_ptr<PamHolder> holder_;  // where limits cannot be raised again
  std::vector<gid_t> own_groups_;
  std::unique_ptr<ProcessTree> tree_;

  std::unique_ptr<ChannelHost> host_;
  std::map<std::uint32_t, std::unique_ptr<SessionChannel>> channels_;  // open ones, by net's number
  std::vector<std::unique_ptr<SessionChannel>> closing_;               // closed ones with something left
  std::unique_ptr<TimeLimits> limits_;
  std::unique_ptr<Forwarding> forwarding_;
  std::map<std::uint32_t, std::deque<Message>> held_;  // requests of channels whose agent is being asked for: answers keep their order
  std::size_t held_bytes_ = 0;
  bool sweep_ = false;
  std::uint32_t told_channels_ = 0;

  struct SignRequest {
    net::AskSign ask;
    bool forwarded = false;
    Clock::time_point deadline;
  };
  std::deque<SignRequest> sign_requests_;
  unsigned sign_tokens_ = sign_burst;
  Clock::time_point sign_refilled_ = Clock::now();

  bool registering_ = false;
  std::chrono::milliseconds register_delay_ = register_first_retry;
  Poller::TimerId register_timer_ = 0, orphan_timer_ = 0, sign_timer_ = 0, sign_later_ = 0, channels_timer_ = 0;

  bool revoked_ = false;
  bool ending_tree_ = false;
  bool killed_ = false;
  bool waited_ = false;  // long enough for the programs
};

}  // namespace postern::sshd::session
