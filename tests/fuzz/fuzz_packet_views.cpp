// libFuzzer target for what postern-net reads in a client's packets itself (sshd/net/packet_view.h): any bytes are read or refused, and what
// was read was there.
//
//     cmake --preset fuzz && cmake --build --preset fuzz --target fuzz_packet_views
//     build/fuzz/bin/fuzz_packet_views -dict=tests/fuzz/net.dict -max_len=4096 -max_total_time=300 build/fuzz/packet_views tests/fuzz/corpus/packet_views
//
// The first byte is the message's number (RFC 4250 section 4.1.2), as in a packet.
#include "sshd/net/packet_view.h"
#include "sshd/protocol/ssh_wire.h"

#include <cstdint>
#include <cstdlib>
#include <string_view>

using namespace postern::sshd::net::ext;

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}
bool within(std::string_view payload, std::string_view part) { return payload.find(part) != std::string_view::npos; }

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) return 0;
  // A copy of its own size: a read beyond it is one beyond the allocation.
  const std::string copy(reinterpret_cast<const char*>(data) + 1, size - 1);
  const std::string_view payload{copy};
  switch (data[0]) {
    case 50: {
      const auto request = read_auth_request(payload);
      if (request.acceptable) require(payload.size() > 4 && payload[0] == 0 && payload[1] == 0 && payload[2] == 0 && payload[3] != 0);
      require(within(payload, request.method));
      break;
    }
    case 80:
      if (const auto request = read_global_request(payload)) {
        require(payload.size() >= 5 && within(payload, request->target));
        if (request->kind == GlobalRequest::Kind::no_more_sessions || request->kind == GlobalRequest::Kind::listen_socket) require(request->port == 0);
      }
      break;
    case 90:
      if (const auto open = read_channel_open(payload)) {
        require(payload.size() >= 16 + open->type.size() && within(payload, open->type) && within(payload, open->target));
        if (!open->target.empty() || open->malformed) require(open->type == "direct-tcpip" || open->type == "direct-streamlocal@openssh.com");
      }
      break;
    case 98:
      if (const auto addressed = read_channel_request(payload)) {
        const auto& request = addressed->request;
        require(payload.size() >= 9 + addressed->name.size() && within(payload, addressed->name));
        require(within(payload, request.text) && within(payload, request.value));
        if (request.kind == ChannelRequest::Kind::pty) require(payload.size() >= 9 + addressed->name.size() + 24 + request.text.size() + request.value.size());
      }
      break;
    default: {  // the reader alone, in the order that the bytes name
      postern::sshd::WireView view{payload};
      for (const char c : payload) {
        const bool was = view.ok();
        std::size_t got = 0;
        if (c % 3 == 0) got = view.u8();
        if (c % 3 == 1) got = view.u32();
        if (c % 3 == 2) got = view.text().size();
        require(was || (!view.ok() && got == 0));
        require(view.ok() || got == 0);
      }
    }
  }
  return 0;
}
