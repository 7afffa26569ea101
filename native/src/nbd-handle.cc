#include "nbd-handle.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace holdfast {

namespace {
constexpr int kGoodbyeMs = 500;

Failure Closed(const std::string& op) { return Failure("NBD_CLOSED", op, op + ": the handle is closed", EBADF); }
}  // namespace

const char* HandleRequest::name() const {
  switch (call) {
    case HandleCall::kRead:
      return "pread";
    case HandleCall::kWrite:
      return "pwrite";
    case HandleCall::kZero:
      return "zero";
    case HandleCall::kTrim:
      return "trim";
    case HandleCall::kCache:
      return "cache";
    case HandleCall::kFlush:
      return "flush";
    case HandleCall::kBlockStatus:
      return "blockStatus";
  }
  return "request";
}

NbdHandleCore::NbdHandleCore(ConnectSpec spec, int request_timeout_ms)
    : spec_(std::move(spec)), request_timeout_ms_(request_timeout_ms) {}

void NbdHandleCore::Open(ThreadGroup& threads, OnOpen on_open) {
  {
    std::lock_guard lock(mutex_);
    has_thread_ = true;
  }
  threads.Watch(shared_from_this());
  threads.Start([self = shared_from_this(), on_open = std::move(on_open)] { self->Run(on_open); });
}

void NbdHandleCore::List(ThreadGroup& threads, OnList on_list) {
  {
    std::lock_guard lock(mutex_);
    has_thread_ = true;
  }
  threads.Watch(shared_from_this());
  threads.Start([self = shared_from_this(), on_list = std::move(on_list)] {
    try {
      const auto entries = NbdConnection::ListExports(self->spec_, self->wake_);
      on_list(&entries, nullptr);
    } catch (const Failure& failure) {
      on_list(nullptr, &failure);
    } catch (const std::exception& error) {
      const Failure failure("NBD_CONNECT", "listExports", error.what(), ENOMEM);
      on_list(nullptr, &failure);
    }
    self->Ended();
  });
}

void NbdHandleCore::Run(const OnOpen& on_open) {
  std::unique_ptr<NbdConnection> connection;
  bool is_open = false;
  try {
    connection = NbdConnection::Open(spec_, wake_);
    is_open = true;
    on_open(&connection->facts(), nullptr);
    Serve(*connection);
    connection->Disconnect(kGoodbyeMs);
    End(Closed("request"));
  } catch (const Failure& failure) {
    if (!is_open) on_open(nullptr, &failure);
    End(failure);
  } catch (const std::exception& error) {
    const Failure failure(is_open ? "NBD_PROTOCOL" : "NBD_CONNECT", "connection", error.what(), ENOMEM);
    if (!is_open) on_open(nullptr, &failure);
    End(failure);
  }
  connection.reset();
  under_way_.clear();  // only now has libnbd forgotten their buffers
  Ended();
}

void NbdHandleCore::Submit(std::unique_ptr<HandleRequest> request) {
  std::optional<Failure> refusal;
  {
    std::lock_guard lock(mutex_);
    if (wake_.stopped())
      refusal = Closed(request->name());
    else if (end_)
      refusal = end_;
    else
      submitted_.push_back(std::move(request));
  }
  if (refusal)
    request->settle(*request, &*refusal);
  else
    wake_.Set();
}

void NbdHandleCore::Close(std::function<void()> on_closed) {
  bool is_ended;
  {
    std::lock_guard lock(mutex_);
    wake_.Stop();
    is_ended = !has_thread_;
    if (!is_ended) on_closed_.push_back(std::move(on_closed));
  }
  if (is_ended) on_closed();
}

void NbdHandleCore::Serve(NbdConnection& connection) {
  while (!wake_.stopped()) {
    Take(connection);
    SettleDone();
    const int64_t wait = std::clamp<int64_t>(NextDeadline() - NowMs(), 0, 60000);
    pollfd fds[2] = {{connection.fd(), connection.events(), 0}, {wake_.fd(), POLLIN, 0}};
    if (poll(fds, 2, static_cast<int>(wait)) < 0 && errno != EINTR) {
      throw Failure("NBD_PROTOCOL", "connection", "poll: " + ErrorText(errno), errno);
    }
    if (fds[1].revents != 0) wake_.Drain();
    connection.Notify(fds[0].revents);
    SettleDone();
    CheckDeadlines();
  }
}

void NbdHandleCore::Take(NbdConnection& connection) {
  std::deque<std::unique_ptr<HandleRequest>> batch;
  {
    std::lock_guard lock(mutex_);
    batch.swap(submitted_);
  }
  std::optional<Failure> death;
  for (auto& request : batch) {
    request->deadline_ms = NowMs() + request_timeout_ms_;
    HandleRequest& it = *request;
    under_way_.push_back(std::move(request));
    if (death) continue;
    try {
      Issue(connection, it);
    } catch (const Failure& failure) {
      if (failure.code != "NBD_REQUEST") {
        death = failure;
        continue;
      }
      it.settle(it, &failure);
      under_way_.pop_back();
    }
  }
  if (death) throw *death;
}

void NbdHandleCore::Issue(NbdConnection& connection, HandleRequest& request) {
  switch (request.call) {
    case HandleCall::kRead:
      connection.Read(request.buffer.data(), request.buffer.size(), request.offset, &request);
      return;
    case HandleCall::kWrite:
      connection.Write(request.buffer.data(), request.buffer.size(), request.offset, request.flags, &request);
      return;
    case HandleCall::kZero:
      connection.Zero(request.length, request.offset, request.flags, &request);
      return;
    case HandleCall::kTrim:
      connection.Trim(request.length, request.offset, request.flags, &request);
      return;
    case HandleCall::kCache:
      connection.Cache(request.length, request.offset, &request);
      return;
    case HandleCall::kFlush:
      connection.Flush(&request);
      return;
    case HandleCall::kBlockStatus:
      request.status = std::make_shared<StatusMap>();
      connection.BlockStatus(request.length, request.offset, request.status, &request);
      return;
  }
}

void NbdHandleCore::SettleDone() {
  std::erase_if(under_way_, [](const auto& request) {
    if (!request->is_done) return false;
    if (request->error == 0) {
      request->settle(*request, nullptr);
    } else {
      const Failure failure("NBD_REQUEST", request->name(),
                            std::string(request->name()) + ": the server answered: " + ErrorText(request->error),
                            request->error, static_cast<double>(request->offset));
      request->settle(*request, &failure);
    }
    return true;
  });
}

int64_t NbdHandleCore::NextDeadline() const {
  // Requests are kept in the order they were sent, and all have the same time.
  return under_way_.empty() ? NowMs() + 60000 : under_way_.front()->deadline_ms;
}

void NbdHandleCore::CheckDeadlines() {
  if (under_way_.empty() || NowMs() < under_way_.front()->deadline_ms) return;
  const HandleRequest& late = *under_way_.front();
  throw Failure(
      "NBD_STALLED", late.name(),
      std::string(late.name()) + ": the server did not answer within " + std::to_string(request_timeout_ms_) + " ms",
      ETIMEDOUT, static_cast<double>(late.offset));
}

void NbdHandleCore::End(const Failure& failure) {
  std::deque<std::unique_ptr<HandleRequest>> waiting;
  {
    std::lock_guard lock(mutex_);
    end_ = wake_.stopped() ? Closed("request") : failure;
    waiting.swap(submitted_);
  }
  for (auto& request : under_way_) request->settle(*request, &*end_);
  for (auto& request : waiting) request->settle(*request, &*end_);
}

void NbdHandleCore::Ended() {
  std::vector<std::function<void()>> waiting;
  {
    std::lock_guard lock(mutex_);
    has_thread_ = false;
    waiting.swap(on_closed_);
  }
  for (auto& on_closed : waiting) on_closed();
}

}  // namespace holdfast
