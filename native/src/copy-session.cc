#include "copy-session.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <limits>
#include <utility>

#include "copy-worker.h"

namespace holdfast {

namespace {
constexpr int kWatchMs = 200;
constexpr int kJoinMs = 1500;
// More than cores: each does one synchronous call at a time, and disks like several.
constexpr int kFileWorkers = 4;
}  // namespace

CopySession::CopySession(SessionSpec spec) : spec_(std::move(spec)), append_end_(spec_.sink.start_offset) {
  rate_limit_.Set(spec_.rate_limit);
}

CopySession::~CopySession() = default;

void CopySession::Open(const std::shared_ptr<ThreadGroup>& threads,
                       std::function<void(const SessionFacts*, const Failure*)> on_open) {
  threads_ = threads;
  {
    std::lock_guard lock(mutex_);
    has_supervisor_ = true;
  }
  threads->Watch(shared_from_this());
  try {
    threads->Start([self = shared_from_this(), on_open = std::move(on_open)] { self->Supervise(on_open); });
  } catch (...) {
    std::lock_guard lock(mutex_);
    has_supervisor_ = false;
    throw;
  }
}

void CopySession::Supervise(const std::function<void(const SessionFacts*, const Failure*)>& on_open) {
  try {
    const SessionFacts facts = StartWorkers();
    on_open(&facts, nullptr);
  } catch (const Failure& failure) {
    Fail(failure);
  } catch (const std::exception& error) {
    Fail(Failure("FILE_IO", "open", error.what(), ENOMEM));
  }
  if (has_failed()) on_open(nullptr, &*failure_);  // does nothing when it was opened
  WatchWorkers();
  // Who waits for the end may unmount what the files are on; JavaScript may keep this object longer.
  source_files_.reset();
  sink_file_.reset();
  std::vector<std::function<void()>> waiting;
  {
    std::lock_guard lock(mutex_);
    has_supervisor_ = false;
    waiting.swap(on_closed_);
  }
  for (auto& on_closed : waiting) on_closed();
}

void CopySession::OpenFiles() {
  if (!spec_.source.nbd) {
    source_files_ = std::make_shared<FilesSource::Files>();
    for (const auto& path : spec_.source.paths) {
      source_files_->push_back(std::make_shared<OpenFile>(path, O_RDONLY, "openSource"));
    }
  }
  if (spec_.sink.kind == SinkSpec::Kind::kFile || spec_.sink.kind == SinkSpec::Kind::kAppend) {
    sink_file_ = std::make_shared<OpenFile>(spec_.sink.path, O_WRONLY, "openSink");
  }
}

std::unique_ptr<CopySource> CopySession::OpenSource(Wake& wake, Heart& heart) const {
  if (!spec_.source.nbd) return std::make_unique<FilesSource>(source_files_, heart);
  return std::make_unique<NbdSource>(NbdConnection::Open(*spec_.source.nbd, wake), spec_.shape);
}

std::unique_ptr<CopySink> CopySession::OpenSink(Wake& wake, Heart& heart, bool flushes) const {
  switch (spec_.sink.kind) {
    case SinkSpec::Kind::kNull:
      return std::make_unique<NullSink>();
    case SinkSpec::Kind::kFile:
      return std::make_unique<FileSink>(
          FileSinkOptions{sink_file_, nullptr, spec_.sink.is_zeroed, flushes, spec_.shape}, heart);
    case SinkSpec::Kind::kAppend:
      // Zero clusters take no place; whoever asked for the copy notes them.
      return std::make_unique<FileSink>(FileSinkOptions{sink_file_, &append_end_, true, flushes, spec_.shape}, heart);
    case SinkSpec::Kind::kNbd:
      break;
  }
  return std::make_unique<NbdSink>(NbdConnection::Open(spec_.sink.nbd, wake), spec_.shape);
}

// The first worker's connections are opened here, so that what is wrong with them is the session's own
// failure. The others connect in their own threads and join when, and if, the server lets them in.
SessionFacts CopySession::StartWorkers() {
  OpenFiles();
  auto first = std::make_shared<CopyWorker>(*this, 0);
  first->Connect(opening_);
  SessionFacts facts;
  if (auto* connection = first->source_connection()) facts.source = connection->facts();
  if (auto* connection = first->sink_connection()) facts.sink = connection->facts();
  std::vector<std::shared_ptr<CopyWorker>> workers{first};
  for (int i = 1; i < WorkerCount(facts); i++) workers.push_back(std::make_shared<CopyWorker>(*this, i));
  {
    std::lock_guard lock(mutex_);
    workers_ = workers;
  }
  for (auto& worker : workers) {
    {
      std::lock_guard lock(mutex_);
      running_workers_++;
    }
    try {
      threads_->Start([self = shared_from_this(), worker] { worker->Run(); });
    } catch (...) {
      std::lock_guard lock(mutex_);
      running_workers_--;
      throw;
    }
  }
  return facts;
}

int CopySession::WorkerCount(const SessionFacts& facts) const {
  int count = facts.source || facts.sink ? std::numeric_limits<int>::max() : kFileWorkers;
  if (facts.source) count = std::min(count, facts.source->can_multi_conn ? spec_.source.connections : 1);
  if (facts.sink) count = std::min(count, facts.sink->can_multi_conn ? spec_.sink.connections : 1);
  return std::max(count, 1);
}

// Until the end: sees to it that no worker hangs in a system call, then waits for the workers.
void CopySession::WatchWorkers() {
  std::unique_lock lock(mutex_);
  while (!is_ending()) {
    changed_.wait_for(lock, std::chrono::milliseconds(kWatchMs));
    for (const auto& worker : workers_) {
      if (!worker->is_stuck(spec_.stall_timeout_ms)) continue;
      lock.unlock();
      Fail(Failure("NBD_STALLED", "copy",
                   "a file operation did not end within " + std::to_string(spec_.stall_timeout_ms) + " ms", ETIMEDOUT));
      lock.lock();
      break;
    }
  }
  lock.unlock();
  WakeWorkers();
  lock.lock();
  // A thread inside a system call that never returns keeps what it uses alive, and is left behind.
  changed_.wait_for(lock, std::chrono::milliseconds(kJoinMs), [this] { return running_workers_ == 0; });
}

void CopySession::WakeWorkers() {
  std::vector<std::shared_ptr<CopyWorker>> workers;
  {
    std::lock_guard lock(mutex_);
    workers = workers_;
  }
  for (auto& worker : workers) {
    if (is_ending())
      worker->wake().Stop();
    else
      worker->wake().Set();
  }
}

void CopySession::Submit(WindowSpec spec, PlanWindow::Settle settle) {
  auto window = std::make_shared<PlanWindow>(std::move(spec), spec_.shape, std::move(settle));
  std::optional<Failure> refusal;
  {
    std::lock_guard lock(mutex_);
    if (failure_)
      refusal = failure_;
    else if (is_ending() || workers_.empty())
      refusal = ClosedFailure("submit");
    else
      windows_.push_back(window);
    if (!refusal) SettleComplete();  // an empty window is complete at once
  }
  if (refusal)
    window->SettleWith(&*refusal);
  else
    WakeWorkers();
}

void CopySession::BlockStatus(std::unique_ptr<StatusRequest> request) {
  std::optional<Failure> refusal;
  {
    std::lock_guard lock(mutex_);
    if (failure_)
      refusal = failure_;
    else if (is_ending() || workers_.empty())
      refusal = ClosedFailure("blockStatus");
    else if (!spec_.source.nbd)
      refusal.emplace("NBD_REQUEST", "blockStatus", "the source is no NBD export", EINVAL);
    else
      statuses_.push_back(std::move(request));
  }
  if (refusal)
    request->settle(*request, &*refusal);
  else
    WakeWorkers();
}

void CopySession::Flush(std::function<void(const Failure*)> settle) {
  std::optional<Failure> refusal;
  {
    std::lock_guard lock(mutex_);
    if (failure_)
      refusal = failure_;
    else if (is_ending() || workers_.empty())
      refusal = ClosedFailure("flush");
    else {
      auto flush = std::make_shared<FlushRequest>();
      flush->settle = std::move(settle);
      // Worker 0 counts also while its thread is just starting.
      for (auto& worker : workers_) {
        const bool takes_part =
            worker->index() == 0 || std::find(joined_.begin(), joined_.end(), worker.get()) != joined_.end();
        if (!takes_part) continue;
        flush->open++;
        worker->QueueFlush(flush);
      }
      flushes_.push_back(flush);
    }
  }
  if (refusal)
    settle(&*refusal);
  else
    WakeWorkers();
}

uint64_t CopySession::Reserve(uint64_t bytes) {
  const uint64_t cluster = spec_.shape.cluster_bytes;
  return append_end_.fetch_add((bytes + cluster - 1) / cluster * cluster);
}

SessionProgress CopySession::progress() const {
  return {bytes_read_,         bytes_written_,      bytes_zeroed_,    bytes_skipped_,
          requests_in_flight_, source_connections_, sink_connections_};
}

void CopySession::SetRateLimit(double bytes_per_second) {
  {
    std::lock_guard lock(mutex_);
    rate_limit_.Set(bytes_per_second);
  }
  WakeWorkers();
}

void CopySession::Fail(const Failure& failure) {
  std::deque<std::shared_ptr<PlanWindow>> windows;
  std::deque<std::unique_ptr<StatusRequest>> statuses;
  std::vector<std::shared_ptr<FlushRequest>> flushes;
  {
    std::lock_guard lock(mutex_);
    if (failure_ || is_ending()) return;
    failure_ = failure;
    has_failed_ = true;
    is_ending_ = true;
    windows.swap(windows_);
    statuses.swap(statuses_);
    flushes.swap(flushes_);
  }
  for (auto& it : windows) it->SettleWith(&failure);
  for (auto& it : statuses) it->settle(*it, &failure);
  for (auto& it : flushes) it->settle(&failure);
  opening_.Stop();
  WakeWorkers();
  changed_.notify_all();
}

void CopySession::Close(std::function<void()> on_closed) {
  bool is_idle;
  {
    std::lock_guard lock(mutex_);
    is_idle = windows_.empty() && statuses_.empty() && flushes_.empty() && !workers_.empty();
    if (is_idle && !failure_) is_ending_ = true;
  }
  if (!is_idle) Fail(ClosedFailure("close"));
  bool is_ended;
  {
    std::lock_guard lock(mutex_);
    is_ended = !has_supervisor_;
    if (!is_ended) on_closed_.push_back(std::move(on_closed));
  }
  opening_.Stop();
  WakeWorkers();
  changed_.notify_all();
  if (is_ended) on_closed();
}

void CopySession::RequestStop() { Fail(Cancelled("copy")); }

Failure CopySession::EndFailure(const char* op) const {
  std::lock_guard lock(mutex_);
  return failure_ ? *failure_ : ClosedFailure(op);
}

Failure CopySession::ClosedFailure(const char* op) const {
  return Failure("NBD_CLOSED", op, std::string(op) + ": the copy session is closed", EBADF);
}

CopySession::Next CopySession::NextTask(Task* task, int64_t* wait_ms) {
  std::lock_guard lock(mutex_);
  if (is_ending()) return Next::kNone;
  for (auto& window : windows_) {
    if (window->is_cut()) continue;
    const uint64_t bytes = window->next_read_bytes();
    *wait_ms = bytes == 0 ? 0 : rate_limit_.Take(bytes, NowMs());
    if (*wait_ms > 0) return Next::kWait;
    window->Next(task);
    task->window = window;
    return Next::kTask;
  }
  return Next::kNone;
}

void CopySession::TaskDone(const Task& task, const WindowOutcome& outcome) {
  bytes_read_ += outcome.bytes_read;
  bytes_written_ += outcome.bytes_written;
  bytes_zeroed_ += outcome.bytes_zeroed;
  bytes_skipped_ += outcome.bytes_skipped;
  std::lock_guard lock(mutex_);
  task.window->Finish(outcome);
  if (task.window->is_complete()) SettleComplete();
}

// Under the lock, so that results leave in the order of submission. Settling only posts.
void CopySession::SettleComplete() {
  while (!windows_.empty() && windows_.front()->is_complete()) {
    auto window = std::move(windows_.front());
    windows_.pop_front();
    window->SettleWith(nullptr);
  }
}

std::unique_ptr<StatusRequest> CopySession::NextStatus() {
  std::lock_guard lock(mutex_);
  if (statuses_.empty()) return nullptr;
  auto request = std::move(statuses_.front());
  statuses_.pop_front();
  return request;
}

void CopySession::Joined(CopyWorker& worker) {
  std::lock_guard lock(mutex_);
  joined_.push_back(&worker);
}

void CopySession::Flushed(FlushRequest& flush) {
  std::lock_guard lock(mutex_);
  if (--flush.open > 0) return;
  std::erase_if(flushes_, [&](const auto& it) { return it.get() == &flush; });
  flush.settle(nullptr);
}

void CopySession::Left(CopyWorker& worker) {
  std::lock_guard lock(mutex_);
  std::erase(joined_, &worker);
  running_workers_--;
  changed_.notify_all();
}

}  // namespace holdfast
