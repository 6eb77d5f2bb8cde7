#include "recorder/relay/failover.h"

#include <algorithm>
#include <utility>

namespace postern::recorder::relay {

using wire::RecorderState;

Failover::Health Failover::health(Recorder recorder) const {
  const auto it = health_.find(recorder);
  return it == health_.end() ? Health::unknown : it->second;
}

bool Failover::up(Recorder recorder) const { return health(recorder) == Health::up; }

const Failover::Recorder* Failover::at(Recording recording) const {
  const auto it = items_.find(recording);
  return it != items_.end() && it->second.placed ? &it->second.where : nullptr;
}

bool Failover::wants_recorder(Recording recording) const {
  const auto it = items_.find(recording);
  return it != items_.end() && !it->second.placed;
}

bool Failover::can_take(const Item& item, Recorder recorder) const {
  return health(recorder) == Health::up && !item.refused.contains(recorder) && !item.banned.contains(recorder);
}

bool Failover::has_another(Recording recording) const {
  const auto it = items_.find(recording);
  if (it == items_.end() || !it->second.placed) return false;
  const Item& item = it->second;
  return std::any_of(item.list.begin(), item.list.end(), [&](Recorder r) { return r != item.where && can_take(item, r); });
}

std::vector<Failover::Action> Failover::take() { return std::exchange(actions_, {}); }

void Failover::tell(Recording recording, Item& item, RecorderState state) {
  if (item.told && item.state == state && state != RecorderState::recording) return;
  item.told = true;
  item.state = state;
  actions_.push_back({Action::Kind::tell, item.where, recording, state});
}

/// Every recorder of the list that is not known to be up gets a fresh attempt; what ran already counts as one.
void Failover::start_round(Item& item) {
  item.untried.clear();
  for (const Recorder r : item.list) {
    if (item.banned.contains(r)) continue;
    const Health h = health(r);
    if (h == Health::up || h == Health::closed) continue;
    item.untried.insert(r);
    if (h == Health::trying) continue;
    health_[r] = Health::trying;
    actions_.push_back({Action::Kind::attempt, r, 0, RecorderState::searching});
  }
}

void Failover::place(Recording recording, Item& item) {
  if (item.placed) return;
  for (const Recorder r : item.list) {
    if (!can_take(item, r)) continue;
    item.placed = true;
    item.open = false;
    item.where = r;
    item.untried.clear();
    tell(recording, item, RecorderState::searching);
    actions_.push_back({Action::Kind::open, r, recording, RecorderState::searching});
    return;
  }
  tell(recording, item, item.untried.empty() ? RecorderState::none : RecorderState::searching);
}

void Failover::add(Recording recording, std::vector<Recorder> list) {
  Item& item = items_[recording];
  item = {};
  item.list = std::move(list);
  // All of the list, even when one is up already: the others are to be known and warm before they are needed.
  start_round(item);
  place(recording, item);
}

void Failover::remove(Recording recording) { items_.erase(recording); }

void Failover::answering(Recorder recorder) {
  health_[recorder] = Health::up;
  for (auto& [recording, item] : items_) {
    item.untried.erase(recorder);
    if (!item.placed) item.refused.erase(recorder);
    place(recording, item);
  }
}

void Failover::not_accepting(Recorder recorder) {
  health_[recorder] = Health::closed;
  for (auto& [recording, item] : items_) {
    item.untried.erase(recorder);
    place(recording, item);
  }
}

void Failover::lost(Recorder recorder) {
  health_[recorder] = Health::down;
  for (auto& [recording, item] : items_) {
    item.untried.erase(recorder);
    if (item.placed && item.where == recorder) {
      item.placed = item.open = false;
      // When no other is up, one fresh try of all before the session is told that there is none: what was down a while ago need
      // not be down now. The one just lost is tried again too, but not waited for.
      if (std::none_of(item.list.begin(), item.list.end(), [&](Recorder r) { return can_take(item, r); })) {
        start_round(item);
        item.untried.erase(recorder);
      }
    }
    place(recording, item);
  }
}

void Failover::opened(Recording recording, Recorder recorder) {
  const auto it = items_.find(recording);
  if (it == items_.end() || !it->second.placed || it->second.where != recorder || it->second.open) return;
  it->second.open = true;
  it->second.refused.clear();
  tell(recording, it->second, RecorderState::recording);
}

void Failover::refused(Recording recording, Recorder recorder, Refusal refusal) {
  const auto it = items_.find(recording);
  if (it == items_.end()) return;
  Item& item = it->second;
  (refusal == Refusal::for_good ? item.banned : item.refused).insert(recorder);
  if (!item.placed || item.where != recorder) return;
  item.placed = item.open = false;
  if (std::none_of(item.list.begin(), item.list.end(), [&](Recorder r) { return can_take(item, r); })) start_round(item);
  place(recording, item);
}

void Failover::retry() {
  for (auto& [recording, item] : items_) {
    if (item.placed || item.refused.empty()) continue;
    item.refused.clear();
    place(recording, item);
  }
}

}  // namespace postern::recorder::relay
