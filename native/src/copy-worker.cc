#include "copy-worker.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace holdfast {

namespace {
constexpr int kGoodbyeMs = 500;
constexpr int64_t kIdlePollMs = 60000;
}  // namespace

// One task on its way, with the memory for it.
struct CopyWorker::Slot : Io {
  enum class Stage { kReading, kWriting };

  Slot(CopyWorker& owner, size_t request_bytes) : worker(owner), buffer(request_bytes) {}
  void OnFinished() override { worker.ready_.push_back(this); }

  CopyWorker& worker;
  RequestBuffer buffer;
  Task task;
  Stage stage = Stage::kReading;
  WindowOutcome outcome;
  std::vector<SinkRun> runs;
};

struct CopyWorker::FlushIo : Io {
  std::shared_ptr<FlushRequest> request;
  bool is_done = false;
  void OnFinished() override { is_done = true; }
};

CopyWorker::CopyWorker(CopySession& session, int index)
    : session_(session),
      index_(index),
      judge_(session.spec().shape, session.spec().sink.kind != SinkSpec::Kind::kNull) {}

CopyWorker::~CopyWorker() = default;

void CopyWorker::Connect(Wake& wake) {
  source_ = session_.OpenSource(wake, *this);
  sink_ = session_.OpenSink(wake, *this, index_ == 0);
}

bool CopyWorker::ConnectExtra() {
  try {
    Connect(wake_);
    return true;
  } catch (const Failure&) {
    // Fewer connections than were allowed are shown in the progress; a server that is really gone is
    // found by those that have work.
    return false;
  }
}

void CopyWorker::Run() {
  try {
    if (source_ != nullptr || ConnectExtra()) {
      const int source = source_connection() != nullptr ? 1 : 0;
      const int sink = sink_connection() != nullptr ? 1 : 0;
      session_.CountConnections(source, sink);
      session_.Joined(*this);
      Loop();
      busy_since_ms_ = 0;
      if (!session_.has_failed()) {
        if (source > 0) source_connection()->Disconnect(kGoodbyeMs);
        if (sink > 0) sink_connection()->Disconnect(kGoodbyeMs);
      }
      session_.CountConnections(-source, -sink);
    }
  } catch (const Failure& failure) {
    session_.Fail(failure);
  } catch (const std::exception& error) {
    session_.Fail(Failure("FILE_IO", "copy", error.what(), ENOMEM));
  }
  busy_since_ms_ = 0;
  sink_.reset();
  source_.reset();
  slots_.clear();
  const Failure end = session_.EndFailure("blockStatus");
  for (auto& request : statuses_) request->settle(*request, &end);
  statuses_.clear();
  session_.Left(*this);
}

void CopyWorker::Beat() {
  if (session_.is_ending()) throw Cancelled("copy");
  busy_since_ms_.store(NowMs(), std::memory_order_relaxed);
}

bool CopyWorker::is_stuck(int64_t timeout_ms) const {
  const int64_t since = busy_since_ms_.load(std::memory_order_relaxed);
  return since != 0 && NowMs() - since > timeout_ms;
}

void CopyWorker::Loop() {
  while (!session_.is_ending()) {
    TakeStatuses();
    TakeFlushes();
    Fill();
    RunReady();
    Poll();
  }
}

CopyWorker::Slot* CopyWorker::FreeSlot() {
  if (free_.empty()) {
    if (slots_.size() >= static_cast<size_t>(session_.spec().requests_in_flight)) return nullptr;
    slots_.push_back(std::make_unique<Slot>(*this, session_.spec().shape.request_bytes));
    return slots_.back().get();
  }
  Slot* slot = free_.back();
  free_.pop_back();
  return slot;
}

void CopyWorker::Fill() {
  rate_wait_ms_ = 0;
  while (!session_.is_ending()) {
    Slot* slot = FreeSlot();
    if (slot == nullptr) return;
    const auto next = session_.NextTask(&slot->task, &rate_wait_ms_);
    if (next != CopySession::Next::kTask) {
      free_.push_back(slot);
      return;
    }
    Start(*slot);
    // With files the task has already been read: it is finished while its bytes are in the cache.
    RunReady();
  }
}

void CopyWorker::Start(Slot& slot) {
  session_.CountRequest(1);
  slot.outcome = {};
  slot.runs.clear();
  if (!slot.task.is_zero) {
    slot.stage = Slot::Stage::kReading;
    source_->Read(slot.task, slot.buffer, slot);
    return;
  }
  slot.stage = Slot::Stage::kWriting;
  slot.outcome.bytes_zeroed = session_.spec().sink.kind == SinkSpec::Kind::kNull ? 0 : slot.task.length;
  const uint64_t cluster = session_.spec().shape.cluster_bytes;
  size_t ordinal = slot.task.first_entry;
  for (uint64_t at = 0; at < slot.task.length; at += cluster) {
    slot.task.window->Emit(ordinal++, (slot.task.offset + at) / cluster, nullptr);
  }
  slot.Begin("zero");
  sink_->Zero(slot.task.length, slot.task.offset, slot);
  slot.Seal();
}

void CopyWorker::AfterRead(Slot& slot) {
  judge_.Judge(slot.task, slot.buffer.data(), &slot.runs, &slot.outcome);
  slot.stage = Slot::Stage::kWriting;
  slot.Begin("pwrite");
  for (const SinkRun& run : slot.runs) {
    if (run.is_zero)
      sink_->Zero(run.length, slot.task.offset + run.start, slot);
    else
      sink_->Write(slot.buffer.data() + run.start, run.length, PlaceOf(slot.task, run), slot);
  }
  slot.Seal();
}

// Where the run goes in the sink.
uint64_t CopyWorker::PlaceOf(const Task& task, const SinkRun& run) {
  const DiskShape& shape = session_.spec().shape;
  if (!shape.sink_places) return task.offset + run.start;
  const uint64_t place = session_.Reserve(run.length);
  task.window->Place(task.first_entry + run.start / shape.cluster_bytes, run.length, place);
  return place;
}

void CopyWorker::Finish(Slot& slot) {
  session_.CountRequest(-1);
  session_.TaskDone(slot.task, slot.outcome);
  slot.task.window.reset();
  free_.push_back(&slot);
}

void CopyWorker::RunReady() {
  while (!ready_.empty()) {
    Slot& slot = *ready_.back();
    ready_.pop_back();
    if (slot.failure()) throw *slot.failure();
    if (slot.stage == Slot::Stage::kReading)
      AfterRead(slot);
    else
      Finish(slot);
  }
}

void CopyWorker::TakeStatuses() {
  if (index_ != 0 || source_connection() == nullptr) return;
  while (auto request = session_.NextStatus()) {
    request->status = std::make_shared<StatusMap>();
    try {
      source_connection()->BlockStatus(request->length, request->offset, request->status, request.get());
      statuses_.push_back(std::move(request));
    } catch (const Failure& failure) {
      request->settle(*request, &failure);
      if (failure.code != "NBD_REQUEST") throw;
    }
  }
}

void CopyWorker::SettleStatuses() {
  std::erase_if(statuses_, [](const auto& request) {
    if (!request->is_done) return false;
    if (request->error == 0) {
      request->settle(*request, nullptr);
    } else {
      const Failure failure("NBD_REQUEST", "blockStatus",
                            "blockStatus: the server answered: " + ErrorText(request->error), request->error,
                            static_cast<double>(request->offset));
      request->settle(*request, &failure);
    }
    return true;
  });
}

void CopyWorker::QueueFlush(std::shared_ptr<FlushRequest> flush) {
  std::lock_guard lock(flush_mutex_);
  queued_flushes_.push_back(std::move(flush));
}

void CopyWorker::TakeFlushes() {
  std::vector<std::shared_ptr<FlushRequest>> batch;
  {
    std::lock_guard lock(flush_mutex_);
    batch.swap(queued_flushes_);
  }
  for (auto& request : batch) {
    flushing_.push_back(std::make_unique<FlushIo>());
    FlushIo& io = *flushing_.back();
    io.request = std::move(request);
    io.Begin("flush");
    sink_->Flush(io);
    io.Seal();
  }
  SettleFlushes();
}

void CopyWorker::SettleFlushes() {
  std::erase_if(flushing_, [this](const auto& io) {
    if (!io->is_done) return false;
    if (io->failure()) throw Failure(*io->failure());
    session_.Flushed(*io->request);
    return true;
  });
}

int CopyWorker::PollTimeout() const {
  int64_t timeout = rate_wait_ms_ > 0 ? rate_wait_ms_ : kIdlePollMs;
  const int64_t now = NowMs();
  for (NbdConnection* connection : {source_->connection(), sink_->connection()}) {
    if (connection == nullptr || connection->in_flight() == 0) continue;
    timeout = std::min(timeout, connection->last_progress_ms() + session_.spec().stall_timeout_ms - now);
  }
  return static_cast<int>(std::max<int64_t>(timeout, 0));
}

void CopyWorker::Poll() {
  NbdConnection* const connections[2] = {source_->connection(), sink_->connection()};
  pollfd fds[3] = {{-1, 0, 0}, {-1, 0, 0}, {wake_.fd(), POLLIN, 0}};
  for (int i = 0; i < 2; i++) {
    if (connections[i] != nullptr) fds[i] = {connections[i]->fd(), connections[i]->events(), 0};
  }
  busy_since_ms_.store(0, std::memory_order_relaxed);
  if (poll(fds, 3, PollTimeout()) < 0 && errno != EINTR) {
    throw Failure("NBD_PROTOCOL", "copy", "poll: " + ErrorText(errno), errno);
  }
  if (fds[2].revents != 0) wake_.Drain();
  for (int i = 0; i < 2; i++) {
    if (connections[i] == nullptr) continue;
    connections[i]->Notify(fds[i].revents);
    CheckStall(connections[i], i == 0 ? "source" : "sink");
  }
  SettleStatuses();
  SettleFlushes();
}

void CopyWorker::CheckStall(NbdConnection* connection, const char* role) const {
  if (connection->in_flight() == 0) return;
  if (NowMs() - connection->last_progress_ms() <= session_.spec().stall_timeout_ms) return;
  throw Failure("NBD_STALLED", "copy",
                std::string("the ") + role + " answered nothing within " +
                    std::to_string(session_.spec().stall_timeout_ms) + " ms",
                ETIMEDOUT);
}

}  // namespace holdfast
