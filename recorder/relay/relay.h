#pragma once

#include "recorder/journal/journal.h"
#include "recorder/relay/failover.h"
#include "recorder/relay/heads.h"
#include "recorder/relay/recorder_client.h"
#include "recorder/relay/session_link.h"
#include "recorder/relay/settings.h"
#include "recorder/relay/upload.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/steady_timer.hpp>

#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace postern::recorder::relay {

/// postern-relay: takes the sessions' encoded recordings, keeps them in the journal, and brings each to a recorder.
///
/// Drives Failover (which decides), Journal (which keeps), RecorderClient (which talks to a recorder) and SessionLink (which talks to
/// a session). Single-threaded but for the journal's and the heads' threads.
class Relay {
 public:
  Relay(boost::asio::io_context& io, Settings settings);
  ~Relay();

  /// Locks and reads the journal, listens. Recordings of a predecessor go on.
  Expected<Done> start();
  /// Closes all; the journal stays.
  void stop();

 private:
  using Clock = std::chrono::steady_clock;
  using Key = Failover::Recording;

  struct Recording {
    Key key = 0;
    std::shared_ptr<journal::Entry> entry;
    std::shared_ptr<Heads::Cache> heads;
    std::shared_ptr<SessionLink> link;
    std::shared_ptr<Upload> upload;
    std::uint64_t attempt = 0;  // of opens: an answer to an older one is no answer
    bool slot = false;          // counts as one that catches up at its recorder
    std::uint64_t committed = 0;
    wire::local::State state;
    bool end_durable = false;
    bool ending_asked = false;  // the head for a cut is being computed
    bool ended_link = false;    // the session knows that it is over
    bool sought = false;        // failover knows it
    bool empty_told = false;
    bool storing = false;       // a recorder has it, that fact is being made durable
    unsigned stale = 0;         // opens in a row that were refused for their epoch
    std::set<std::string> telling;  // recorders that are being sent a moved notice
  };
  using RecordingPtr = std::shared_ptr<Recording>;

  struct Node {
    std::string name;
    Failover::Recorder index = 0;
    std::unique_ptr<RecorderClient> client;
    std::deque<std::pair<Key, std::uint64_t>> queue;  // opens that wait for a slot: recording, attempt
    unsigned slots = 0;
    Clock::time_point last_wanted{};
  };

  // sessions
  Expected<Done> listen(boost::asio::local::stream_protocol::acceptor& acceptor, const std::string& path) const;
  void accept_session();
  void accept_control();
  void on_open(const std::shared_ptr<SessionLink>& link, const wire::local::Open& open);
  void on_data(Recording& r, std::uint64_t offset, std::string_view bytes);
  void on_end(Recording& r, const wire::local::End& end);
  void on_closed(const RecordingPtr& r, const std::shared_ptr<SessionLink>& link, const std::string& why);
  void tell_acks(Recording& r);
  void tell_ended(Recording& r);
  void journal_failed(Recording& r, const std::string& why);
  RecordingPtr add(std::shared_ptr<journal::Entry> entry);
  void seek_recorder(Recording& r);
  void poke(Recording& r);
  void look_for_dead_sessions();
  void check_session(const RecordingPtr& r);
  void remove_if_done(const RecordingPtr& r);

  // recorders
  Node& node(const std::string& name);
  void run_failover();
  void run_attempts();
  void on_lost(Node& n, const std::string& why);
  void drop_upload(Recording& r, bool had_part);
  void queue_open(Node& n, Recording& r);
  void run_queue(Node& n);
  void release_slot(Recording& r);
  void open_at(Node& n, const RecordingPtr& r, std::uint64_t attempt);
  void on_stored(const RecordingPtr& r, Node& n, bool cut);
  void on_refused(const RecordingPtr& r, Node& n, const Upload::Refused& why);
  void raise_epoch(const RecordingPtr& r, std::uint64_t above, std::function<void(journal::Meta&)> change, std::function<void()> then);
  void tell_moved(const RecordingPtr& r);
  void tick();
  std::string listing() const;
  RecordingPtr find(Key key) const;

  boost::asio::io_context& io_;
  const Settings settings_;
  journal::Journal journal_;
  Heads heads_;
  Failover failover_;
  bool in_failover_ = false;

  boost::asio::local::stream_protocol::acceptor sessions_, control_;
  boost::asio::steady_timer ticker_, attempt_timer_;
  std::set<std::shared_ptr<SessionLink>> links_;
  std::map<Id, RecordingPtr> recordings_;
  std::map<Key, RecordingPtr> by_key_;
  Key next_key_ = 1;
  std::map<std::string, std::unique_ptr<Node>> nodes_;
  std::vector<Node*> by_index_;
  std::deque<Failover::Recorder> attempts_;  // that wait for their turn
  bool attempts_running_ = false;
  std::vector<journal::Meta> lost_at_start_;  // gaps of recordings that never had a file
  Clock::time_point last_liveness_{}, last_moved_{};
  Clock::time_point last_tick_ = Clock::now(), awake_since_{};
  bool stopped_ = false;
};

}  // namespace postern::recorder::relay
