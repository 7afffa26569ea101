#include "resolve.h"

#include <netdb.h>
#include <poll.h>

#include <algorithm>
#include <memory>
#include <thread>

namespace holdfast {

namespace {

struct Lookup {
  Wake done;
  std::atomic<int> result{0};
};

}  // namespace

void ResolveHost(const std::string& host, Wake& wake, int64_t deadline_ms) {
  auto lookup = std::make_shared<Lookup>();
  std::thread([lookup, host] {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    lookup->result = getaddrinfo(host.c_str(), nullptr, &hints, &found);
    if (lookup->result == 0) freeaddrinfo(found);
    lookup->done.Stop();
  }).detach();
  while (!lookup->done.stopped()) {
    if (wake.stopped()) throw Cancelled("connect");
    const int64_t left = deadline_ms - NowMs();
    if (left <= 0) {
      throw Failure("NBD_CONNECT", "connect", "the host name was not resolved within the deadline", ETIMEDOUT);
    }
    pollfd fds[2] = {{lookup->done.fd(), POLLIN, 0}, {wake.fd(), POLLIN, 0}};
    poll(fds, 2, static_cast<int>(std::min<int64_t>(left, 1000)));
    if (fds[1].revents != 0) wake.Drain();
  }
  const int result = lookup->result;
  if (result != 0) {
    throw Failure("NBD_CONNECT", "connect", std::string("the host name cannot be resolved: ") + gai_strerror(result),
                  result == EAI_SYSTEM ? EIO : EHOSTUNREACH);
  }
}

}  // namespace holdfast
