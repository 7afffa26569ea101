#include "nbd-connection.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>

#include "resolve.h"

namespace holdfast {

namespace {

// Block status requests carry 32 bits of length; aligned, so that any block size fits.
constexpr uint64_t kMaxStatusLength = (uint64_t{1} << 32) - 65536;

// libnbd's last error belongs to this thread and to its last call: taken at once.
Failure LastFailure(const char* code, const char* op) {
  const int error = nbd_get_errno();
  const char* text = nbd_get_error();
  return Failure(code, op, text != nullptr ? text : ErrorText(error), error);
}

}  // namespace

// What libnbd's callbacks get to see of one request.
struct NbdConnection::Pending {
  NbdConnection* connection;
  NbdOp* op;
};

NbdConnection::NbdConnection() : nbd_(nbd_create()) {
  if (nbd_ == nullptr) throw LastFailure("NBD_CONNECT", "create");
}

NbdConnection::~NbdConnection() { nbd_close(nbd_); }

std::unique_ptr<NbdConnection> NbdConnection::Open(const ConnectSpec& spec, Wake& wake) {
  const int64_t deadline_ms = NowMs() + spec.connect_timeout_ms;
  std::unique_ptr<NbdConnection> connection(new NbdConnection());
  connection->Configure(spec);
  connection->Handshake(spec, wake, deadline_ms);
  connection->ReadFacts();
  return connection;
}

std::vector<ExportEntry> NbdConnection::ListExports(const ConnectSpec& spec, Wake& wake) {
  const int64_t deadline_ms = NowMs() + spec.connect_timeout_ms;
  NbdConnection connection;
  connection.Configure(spec);
  if (!spec.host.empty()) ResolveHost(spec.host, wake, deadline_ms);
  if (nbd_aio_connect_uri(connection.nbd_, spec.uri.c_str()) == -1) connection.ThrowConnect();
  connection.PollUntil(
      [&] { return nbd_aio_is_negotiating(connection.nbd_) == 1 || nbd_aio_is_ready(connection.nbd_) == 1; }, wake,
      deadline_ms);
  if (nbd_aio_is_negotiating(connection.nbd_) != 1) {
    throw Failure("NBD_REQUEST", "listExports", "the server speaks the old protocol, which cannot list", ENOTSUP);
  }
  struct Listing {
    std::vector<ExportEntry> entries;
    bool is_done = false;
    int error = 0;
  } listing;
  nbd_list_callback on_entry{};
  on_entry.callback = [](void* data, const char* name, const char* description) {
    static_cast<Listing*>(data)->entries.push_back({name, description});
    return 0;
  };
  on_entry.user_data = &listing;
  nbd_completion_callback on_done{};
  on_done.callback = [](void* data, int* error) {
    static_cast<Listing*>(data)->error = *error;
    static_cast<Listing*>(data)->is_done = true;
    return 1;
  };
  on_done.user_data = &listing;
  if (nbd_aio_opt_list(connection.nbd_, on_entry, on_done) == -1) throw LastFailure("NBD_REQUEST", "listExports");
  connection.PollUntil([&] { return listing.is_done; }, wake, deadline_ms);
  if (listing.error != 0) {
    throw Failure("NBD_REQUEST", "listExports", "the server does not list its exports: " + ErrorText(listing.error),
                  listing.error);
  }
  nbd_aio_opt_abort(connection.nbd_);
  return listing.entries;
}

void NbdConnection::Configure(const ConnectSpec& spec) {
  auto check = [](int result) {
    if (result == -1) throw LastFailure("NBD_CONNECT", "connect");
  };
  check(nbd_set_opt_mode(nbd_, true));
  check(nbd_set_pread_initialize(nbd_, false));  // nothing is read from a buffer whose read failed
  check(nbd_set_uri_allow_transports(nbd_, LIBNBD_ALLOW_TRANSPORT_TCP | LIBNBD_ALLOW_TRANSPORT_UNIX));
  check(nbd_set_uri_allow_local_file(nbd_, false));
  const bool has_tls = !spec.certificates.empty() || !spec.psk_file.empty();
  if (has_tls) {
    if (nbd_supports_tls(nbd_) != 1) throw Failure("NBD_CONNECT", "connect", "this libnbd has no TLS", ENOTSUP);
    // Whoever names keys wants TLS: never a plain connection then, whatever the scheme of the URI.
    check(nbd_set_tls(nbd_, LIBNBD_TLS_REQUIRE));
  }
  if (!spec.certificates.empty()) {
    check(nbd_set_tls_certificates(nbd_, spec.certificates.c_str()));
    check(nbd_set_tls_verify_peer(nbd_, true));
  }
  if (!spec.psk_file.empty()) check(nbd_set_tls_psk_file(nbd_, spec.psk_file.c_str()));
  if (!spec.username.empty()) check(nbd_set_tls_username(nbd_, spec.username.c_str()));
  for (const auto& context : spec.contexts) check(nbd_add_meta_context(nbd_, context.c_str()));
}

void NbdConnection::Handshake(const ConnectSpec& spec, Wake& wake, int64_t deadline_ms) {
  if (!spec.host.empty()) ResolveHost(spec.host, wake, deadline_ms);
  if (nbd_aio_connect_uri(nbd_, spec.uri.c_str()) == -1) {
    Failure failure = LastFailure("NBD_CONNECT", "connect");
    const bool was_started = nbd_aio_is_created(nbd_) != 1;
    if (!was_started && failure.error == EINVAL) failure.code = "NBD_URI_INVALID";
    throw failure;
  }
  PollUntil([this] { return nbd_aio_is_negotiating(nbd_) == 1 || nbd_aio_is_ready(nbd_) == 1; }, wake, deadline_ms);
  if (nbd_aio_is_negotiating(nbd_) == 1) {
    ExpandContexts(spec, wake, deadline_ms);
    Go(wake, deadline_ms);
  }
}

// `qemu:dirty-bitmap:` means all bitmaps, but only in a listing: what is to be granted is then asked by
// full name.
void NbdConnection::ExpandContexts(const ConnectSpec& spec, Wake& wake, int64_t deadline_ms) {
  granted_candidates_ = spec.contexts;
  const bool has_wildcard =
      std::any_of(spec.contexts.begin(), spec.contexts.end(), [](const auto& it) { return it.ends_with(':'); });
  if (!has_wildcard || nbd_get_structured_replies_negotiated(nbd_) != 1) return;
  struct Listing {
    std::vector<std::string> names;
    bool is_done = false;
    int error = 0;
  } listing;
  nbd_context_callback on_name{};
  on_name.callback = [](void* data, const char* name) {
    static_cast<Listing*>(data)->names.push_back(name);
    return 0;
  };
  on_name.user_data = &listing;
  nbd_completion_callback on_done{};
  on_done.callback = [](void* data, int* error) {
    static_cast<Listing*>(data)->error = *error;
    static_cast<Listing*>(data)->is_done = true;
    return 1;
  };
  on_done.user_data = &listing;
  if (nbd_aio_opt_list_meta_context(nbd_, on_name, on_done) == -1) ThrowConnect();
  PollUntil([&] { return listing.is_done; }, wake, deadline_ms);
  if (listing.error != 0) return;  // a server that lists nothing grants nothing by wildcard
  for (const auto& name : listing.names) {
    if (std::find(granted_candidates_.begin(), granted_candidates_.end(), name) != granted_candidates_.end()) continue;
    if (nbd_add_meta_context(nbd_, name.c_str()) == -1) ThrowConnect();
    granted_candidates_.push_back(name);
  }
}

void NbdConnection::Go(Wake& wake, int64_t deadline_ms) {
  struct Answer {
    bool is_done = false;
    int error = 0;
    std::string text;
  } answer;
  nbd_completion_callback on_done{};
  on_done.callback = [](void* data, int* error) {
    static_cast<Answer*>(data)->error = *error;
    static_cast<Answer*>(data)->is_done = true;
    return 1;
  };
  on_done.user_data = &answer;
  if (nbd_aio_opt_go(nbd_, on_done) == -1) ThrowConnect();
  PollUntil(
      [&] {
        if (answer.is_done && answer.error != 0) {
          const char* text = nbd_get_error();
          throw Failure("NBD_CONNECT", "connect",
                        text != nullptr ? text : "the server refused the export: " + ErrorText(answer.error),
                        answer.error);
        }
        return nbd_aio_is_ready(nbd_) == 1;
      },
      wake, deadline_ms);
}

void NbdConnection::ReadFacts() {
  const int64_t size = nbd_get_size(nbd_);
  if (size < 0) throw LastFailure("NBD_CONNECT", "connect");
  facts_.size = static_cast<uint64_t>(size);
  facts_.is_read_only = nbd_is_read_only(nbd_) == 1;
  facts_.can_multi_conn = nbd_can_multi_conn(nbd_) == 1;
  facts_.can_flush = nbd_can_flush(nbd_) == 1;
  facts_.can_fua = nbd_can_fua(nbd_) == 1;
  facts_.can_zero = nbd_can_zero(nbd_) == 1;
  facts_.can_fast_zero = nbd_can_fast_zero(nbd_) == 1;
  facts_.can_trim = nbd_can_trim(nbd_) == 1;
  facts_.can_cache = nbd_can_cache(nbd_) == 1;
  facts_.is_rotational = nbd_is_rotational(nbd_) == 1;
  facts_.is_tls = nbd_get_tls_negotiated(nbd_) == 1;
  facts_.is_structured = nbd_get_structured_replies_negotiated(nbd_) == 1;
  if (const char* protocol = nbd_get_protocol(nbd_)) facts_.protocol = protocol;
  auto block = [this](int which) -> uint64_t {
    const int64_t bytes = nbd_get_block_size(nbd_, which);
    return bytes > 0 ? static_cast<uint64_t>(bytes) : 0;
  };
  facts_.minimum_block = block(LIBNBD_SIZE_MINIMUM);
  facts_.preferred_block = block(LIBNBD_SIZE_PREFERRED);
  facts_.maximum_block = block(LIBNBD_SIZE_MAXIMUM);
  for (const auto& name : granted_candidates_) {
    if (!name.ends_with(':') && nbd_can_meta_context(nbd_, name.c_str()) == 1) facts_.contexts.push_back(name);
  }
}

void NbdConnection::ThrowConnect() const { throw LastFailure("NBD_CONNECT", "connect"); }

// A server that accepted and then says nothing is another fault than an address where nobody answers.
void NbdConnection::ThrowTimeout() const {
  const int socket = nbd_aio_get_fd(nbd_);
  sockaddr_storage peer;
  socklen_t length = sizeof peer;
  const bool is_connected = socket >= 0 && getpeername(socket, reinterpret_cast<sockaddr*>(&peer), &length) == 0;
  if (is_connected) {
    throw Failure("NBD_STALLED", "connect", "the server accepted the connection and did not answer in time", ETIMEDOUT);
  }
  throw Failure("NBD_CONNECT", "connect", "no connection within the deadline", ETIMEDOUT);
}

template <typename Predicate>
void NbdConnection::PollUntil(Predicate is_reached, Wake& wake, int64_t deadline_ms) {
  while (!is_reached()) {
    if (wake.stopped()) throw Cancelled("connect");
    if (is_dead()) {
      throw Failure("NBD_CONNECT", "connect", "the server closed the connection during the handshake", ECONNRESET);
    }
    const int64_t left = deadline_ms - NowMs();
    if (left <= 0) ThrowTimeout();
    pollfd fds[2] = {{fd(), events(), 0}, {wake.fd(), POLLIN, 0}};
    if (poll(fds, 2, static_cast<int>(std::min<int64_t>(left, 60000))) < 0 && errno != EINTR) {
      throw Failure("NBD_CONNECT", "connect", "poll: " + ErrorText(errno), errno);
    }
    if (fds[1].revents != 0) wake.Drain();
    if (fds[0].revents == 0) continue;
    const bool wants_read = (fds[0].events & POLLIN) != 0;
    const bool can_read = (fds[0].revents & (POLLIN | POLLHUP | POLLERR)) != 0 && wants_read;
    const int result = can_read ? nbd_aio_notify_read(nbd_) : nbd_aio_notify_write(nbd_);
    if (result == -1 && !is_reached()) ThrowConnect();
  }
}

int NbdConnection::fd() const { return nbd_aio_get_fd(nbd_); }

short NbdConnection::events() const {
  const unsigned direction = nbd_aio_get_direction(nbd_);
  return static_cast<short>(((direction & LIBNBD_AIO_DIRECTION_READ) != 0 ? POLLIN : 0) |
                            ((direction & LIBNBD_AIO_DIRECTION_WRITE) != 0 ? POLLOUT : 0));
}

void NbdConnection::Notify(short revents) {
  if (revents != 0) Step(revents);
  RunCompleted();
}

void NbdConnection::Step(short revents) {
  const unsigned direction = nbd_aio_get_direction(nbd_);
  const bool wants_read = (direction & LIBNBD_AIO_DIRECTION_READ) != 0;
  const bool can_read = (revents & (POLLIN | POLLHUP | POLLERR)) != 0 && wants_read;
  Failure failure("NBD_PROTOCOL", "connection", "the server closed the connection", ECONNRESET);
  if ((can_read ? nbd_aio_notify_read(nbd_) : nbd_aio_notify_write(nbd_)) == -1) {
    failure = LastFailure("NBD_PROTOCOL", "connection");
  }
  if (is_dead()) throw failure;
}

bool NbdConnection::is_dead() const { return nbd_aio_is_dead(nbd_) == 1 || nbd_aio_is_closed(nbd_) == 1; }

void NbdConnection::RunCompleted() {
  if (completed_.empty()) return;
  last_progress_ms_ = NowMs();
  std::vector<NbdOp*> batch;
  batch.swap(completed_);
  for (NbdOp* op : batch) op->OnDone();
}

nbd_completion_callback NbdConnection::Completion(NbdOp* op) {
  nbd_completion_callback completion{};
  completion.callback = [](void* data, int* error) {
    auto* it = static_cast<Pending*>(data);
    it->op->error = *error;
    it->connection->in_flight_--;
    it->connection->completed_.push_back(it->op);
    return 1;  // retires the command
  };
  completion.user_data = new Pending{this, op};
  completion.free = [](void* data) { delete static_cast<Pending*>(data); };
  return completion;
}

void NbdConnection::Issued(int64_t cookie, const char* op) {
  if (cookie == -1) {
    Failure failure = LastFailure("NBD_REQUEST", op);
    if (is_dead()) failure.code = "NBD_PROTOCOL";
    throw failure;
  }
  if (in_flight_++ == 0) last_progress_ms_ = NowMs();
  // libnbd queues a command even when sending it found the connection dead.
  if (is_dead()) throw Failure("NBD_PROTOCOL", op, "the server closed the connection", ECONNRESET);
}

void NbdConnection::Read(void* buffer, size_t length, uint64_t offset, NbdOp* op) {
  Issued(nbd_aio_pread(nbd_, buffer, length, offset, Completion(op), 0), "pread");
}

void NbdConnection::Write(const void* buffer, size_t length, uint64_t offset, uint32_t flags, NbdOp* op) {
  Issued(nbd_aio_pwrite(nbd_, buffer, length, offset, Completion(op), flags), "pwrite");
}

void NbdConnection::Zero(uint64_t length, uint64_t offset, uint32_t flags, NbdOp* op) {
  Issued(nbd_aio_zero(nbd_, length, offset, Completion(op), flags), "zero");
}

void NbdConnection::Trim(uint64_t length, uint64_t offset, uint32_t flags, NbdOp* op) {
  Issued(nbd_aio_trim(nbd_, length, offset, Completion(op), flags), "trim");
}

void NbdConnection::Cache(uint64_t length, uint64_t offset, NbdOp* op) {
  Issued(nbd_aio_cache(nbd_, length, offset, Completion(op), 0), "cache");
}

void NbdConnection::Flush(NbdOp* op) { Issued(nbd_aio_flush(nbd_, Completion(op), 0), "flush"); }

void NbdConnection::BlockStatus(uint64_t length, uint64_t offset, std::shared_ptr<StatusMap> into, NbdOp* op) {
  using Target = std::shared_ptr<StatusMap>;
  nbd_extent_callback extent{};
  extent.callback = [](void* data, const char* context, uint64_t, uint32_t* entries, size_t count, int*) {
    auto& list = (**static_cast<Target*>(data))[context];
    list.insert(list.end(), entries, entries + count);
    return 0;
  };
  extent.user_data = new Target(std::move(into));
  extent.free = [](void* data) { delete static_cast<Target*>(data); };
  Issued(nbd_aio_block_status(nbd_, std::min(length, kMaxStatusLength), offset, extent, Completion(op), 0),
         "blockStatus");
}

void NbdConnection::Disconnect(int timeout_ms) {
  if (nbd_aio_is_ready(nbd_) != 1 || nbd_aio_disconnect(nbd_, 0) == -1) return;
  const int64_t deadline_ms = NowMs() + timeout_ms;
  while (!is_dead()) {
    const int64_t left = deadline_ms - NowMs();
    if (left <= 0) return;
    pollfd it{fd(), events(), 0};
    if (poll(&it, 1, static_cast<int>(left)) < 0 && errno != EINTR) return;
    if (it.revents == 0) continue;
    const bool can_read = (it.revents & (POLLIN | POLLHUP | POLLERR)) != 0 && (it.events & POLLIN) != 0;
    // The other side hanging up is how this ends well: the result does not matter.
    (void)(can_read ? nbd_aio_notify_read(nbd_) : nbd_aio_notify_write(nbd_));
  }
}

void NbdConnection::GrowSendBuffer(int bytes) {
  int domain = 0;
  socklen_t length = sizeof domain;
  if (getsockopt(fd(), SOL_SOCKET, SO_DOMAIN, &domain, &length) != 0 || domain != AF_UNIX) return;
  // The FORCE form goes past net.core.wmem_max and needs CAP_NET_ADMIN; the plain one is clipped there.
  if (setsockopt(fd(), SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof bytes) != 0) {
    setsockopt(fd(), SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
  }
}

}  // namespace holdfast
