// Sections of the file that say nothing of who may log in: looked at for form, so that a slip is told, and forgotten.
#include "auth/policy/reading.h"

namespace postern::auth::policy {
namespace {

using hujson::Kind;
using hujson::Value;

void node_attributes(Reading& r) {
  const Value* all = r.section("nodeAttrs", Kind::array);
  if (all == nullptr) return;
  for (std::size_t i = 0; i < all->items.size(); i++) {
    const Value& item = all->items[i];
    const std::string field = "nodeAttrs[" + std::to_string(i) + "]";
    if (item.kind != Kind::object) {
      r.wrong_kind(item, field, "an object");
      continue;
    }
    for (const std::string_view name : {"target", "attr", "ipPool"}) r.strings(item, name, field);
    if (const auto* app = Reading::find(item, "app"); app != nullptr && app->value.kind != Kind::object && app->value.kind != Kind::null)
      r.wrong_kind(app->value, field + ".app", "an object");
  }
}

void auto_approvers(Reading& r) {
  const Value* all = r.section("autoApprovers", Kind::object);
  if (all == nullptr) return;
  r.strings(*all, "exitNode", "autoApprovers");
  for (const std::string_view name : {"routes", "services"}) {
    const auto* m = Reading::find(*all, name);
    if (m == nullptr || m->value.kind == Kind::null) continue;
    const std::string field = "autoApprovers." + std::string{name};
    if (m->value.kind != Kind::object) {
      r.wrong_kind(m->value, field, "an object");
      continue;
    }
    for (const auto& entry : m->value.members) {
      const std::string where = field + "[" + json_quoted(entry.name) + "]";
      if (name == "routes" && !Prefix::parse(entry.name)) r.problem(entry, where, json_quoted(entry.name) + " is not an IP address or prefix", "\"10.0.0.0/8\": [\"tag:router\"]");
      r.strings(entry.value, where);
    }
  }
}

}  // namespace

void check_other_sections(Reading& reading) {
  node_attributes(reading);
  auto_approvers(reading);
  reading.section("derpMap", Kind::object);
  reading.section("randomizeClientPort", Kind::boolean);
  reading.section("disableIPv4", Kind::boolean);
  reading.section("OneCGNATRoute", Kind::string);
  reading.section("extraDNSRecords", Kind::array);
}

}  // namespace postern::auth::policy
