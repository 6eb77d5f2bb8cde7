#include "cli/control.h"

#include "base/unique_fd.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>

namespace postern::cli {
namespace {

using Json = nlohmann::json;

constexpr std::size_t largest_answer = 64 * 1024 * 1024;
/// posternd answers in milliseconds; one that hangs is to be told of, not waited for.
constexpr timeval answer_time{10, 0};

Expected<std::string> line_from(const std::string& path, const Json& request) {
  const UniqueFd fd{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return Unexpected{system_error("connect to " + path, ENAMETOOLONG)};
  std::memcpy(address.sun_path, path.data(), path.size());
  ::setsockopt(fd.get(), SOL_SOCKET, SO_RCVTIMEO, &answer_time, sizeof answer_time);
  ::setsockopt(fd.get(), SOL_SOCKET, SO_SNDTIMEO, &answer_time, sizeof answer_time);  // connect(2), too: unix(7)
  if (!fd || ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return Unexpected{system_error("connect to " + path + " (is posternd running, and are you root?)")};
  const std::string line = request.dump() + "\n";
  if (::send(fd.get(), line.data(), line.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(line.size()))
    return Unexpected{system_error("ask posternd")};
  std::string answer;
  char buffer[65536];
  while (answer.size() < largest_answer) {
    const ssize_t n = ::read(fd.get(), buffer, sizeof buffer);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return Unexpected{Error{ETIMEDOUT, "posternd did not answer within " + std::to_string(answer_time.tv_sec) + " s"}};
    if (n <= 0) return Unexpected{Error{EPROTO, "posternd closed the connection without an answer"}};
    const std::string_view piece{buffer, static_cast<std::size_t>(n)};
    const auto end = piece.find('\n');  // in the new piece alone: an answer may have MiBs
    answer += piece.substr(0, end);
    if (end != std::string_view::npos) return answer;
  }
  return Unexpected{Error{EFBIG, "posternd's answer is too large"}};
}

}  // namespace

Expected<std::string> ask_text(const std::string& path, const Json& request) {
  auto line = line_from(path, request);
  constexpr std::string_view refusal = "{\"error\":";  // all that such an answer holds
  if (!line || line->compare(0, refusal.size(), refusal) != 0) return line;
  const Json answer = Json::parse(*line, nullptr, false);
  const auto why = answer.find("error");
  if (why == answer.end() || !why->is_string()) return Unexpected{Error{EPROTO, "posternd's answer is not understood"}};
  return Unexpected{Error{EINVAL, why->get<std::string>()}};
}

Expected<Json> ask(const std::string& path, const Json& request) {
  const auto line = ask_text(path, request);
  if (!line) return Unexpected{line.error()};
  Json answer = Json::parse(*line, nullptr, false);
  if (!answer.is_object()) return Unexpected{Error{EPROTO, "posternd's answer is not understood"}};
  return answer;
}

}  // namespace postern::cli
