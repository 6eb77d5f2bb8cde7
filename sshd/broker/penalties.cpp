#include "sshd/broker/penalties.h"

#include <algorithm>
#include <array>

namespace postern::sshd::broker {

std::string source_of(const Node* node, const Address& peer) {
  if (node != nullptr) return "node:" + node->id;
  if (peer.v4()) return peer.text();
  // Names, not numbers, so that no node's id can be taken for an address: the first 8 of 16 bytes.
  constexpr char digits[] = "0123456789abcdef";
  std::string out;
  for (std::size_t i = 0; i < 8; i++) {
    if (i > 0 && i % 2 == 0) out += ':';
    out += digits[peer.bytes()[i] >> 4];
    out += digits[peer.bytes()[i] & 15];
  }
  return out + "::/64";
}

const char* name_of(Offence offence) {
  switch (offence) {
    case Offence::auth_failed: return "auth_failed";
    case Offence::no_auth: return "no_auth";
    case Offence::key_scan: return "key_scan";
    case Offence::grace_exceeded: return "grace_exceeded";
  }
  return "";
}

bool Penalties::refused(const std::string& source, Clock::time_point now) const {
  const auto it = entries_.find(source);
  return it != entries_.end() && it->second.refused && it->second.expires > now;
}

void Penalties::forget(Clock::time_point now) {
  while (!by_end_.empty() && by_end_.begin()->first <= now) {
    entries_.erase(by_end_.begin()->second);
    by_end_.erase(by_end_.begin());
  }
}

Penalties::Entry* Penalties::keep_until(const std::string& source, Clock::time_point expires, Clock::time_point now) {
  if (expires <= now || terms_.sources == 0) return nullptr;
  auto it = entries_.find(source);
  if (it != entries_.end()) {
    by_end_.erase({it->second.expires, source});
  } else {
    if (entries_.size() >= terms_.sources) {
      entries_.erase(by_end_.begin()->second);
      by_end_.erase(by_end_.begin());
    }
    it = entries_.emplace(source, Entry{}).first;
  }
  it->second.expires = expires;
  by_end_.emplace(expires, source);
  return &it->second;
}

std::chrono::milliseconds Penalties::penalty_for(Offence offence) const {
  switch (offence) {
    case Offence::auth_failed: return terms_.auth_failed;
    case Offence::no_auth: return terms_.no_auth;
    case Offence::key_scan: return terms_.key_scan;
    case Offence::grace_exceeded: return terms_.grace_exceeded;
  }
  return terms_.max;
}

std::optional<std::chrono::milliseconds> Penalties::add(const std::string& source, Offence offence, Clock::time_point now) {
  forget(now);
  const auto penalty = penalty_for(offence);
  if (penalty.count() <= 0) return std::nullopt;
  const auto it = entries_.find(source);
  const auto so_far = it != entries_.end() ? it->second.expires : now;
  // max holds for what this adds: a longer one that refuse() set stays.
  Entry* const entry = keep_until(source, std::max(so_far, std::min(so_far + penalty, now + terms_.max)), now);
  if (entry == nullptr || entry->refused || entry->expires - now < terms_.min) return std::nullopt;
  entry->refused = true;
  return std::chrono::ceil<std::chrono::milliseconds>(entry->expires - now);
}

void Penalties::refuse(const std::string& source, std::chrono::milliseconds duration, Clock::time_point now) {
  forget(now);
  const auto it = entries_.find(source);
  const auto so_far = it != entries_.end() ? it->second.expires : now;
  if (Entry* const entry = keep_until(source, std::max(so_far, now + duration), now)) entry->refused = true;
}

void Penalties::forgive(const std::string& source) {
  const auto it = entries_.find(source);
  if (it == entries_.end() || it->second.refused) return;
  by_end_.erase({it->second.expires, source});
  entries_.erase(it);
}

std::optional<std::uint64_t> LogLimit::pass(Clock::time_point now) {
  tokens_ = std::min(burst_, tokens_ + std::chrono::duration<double>(now - refilled_).count() * per_second_);
  refilled_ = now;
  if (tokens_ < 1) {
    left_out_++;
    return std::nullopt;
  }
  tokens_ -= 1;
  return std::exchange(left_out_, 0);
}

}  // namespace postern::sshd::broker
