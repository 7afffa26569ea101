#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "copy-endpoints.h"
#include "plan-window.h"
#include "rate-limit.h"
#include "threads.h"

namespace holdfast {

class CopyWorker;

struct SourceSpec {
  std::optional<ConnectSpec> nbd;  // else files
  std::vector<std::string> paths;
  int connections = 1;
};

struct SinkSpec {
  enum class Kind { kNbd, kFile, kAppend, kNull } kind = Kind::kNull;
  ConnectSpec nbd;
  int connections = 1;
  std::string path;
  bool is_zeroed = false;
  uint64_t start_offset = 0;
};

struct SessionSpec {
  SourceSpec source;
  SinkSpec sink;
  DiskShape shape;
  int requests_in_flight = 16;
  double rate_limit = 0;
  int stall_timeout_ms = 0;
};

struct SessionFacts {
  std::optional<ExportFacts> source, sink;
};

struct SessionProgress {
  uint64_t bytes_read, bytes_written, bytes_zeroed, bytes_skipped;
  int requests_in_flight, source_connections, sink_connections;
};

// Block status asked through the session. `settle` runs once, on any thread.
struct StatusRequest : NbdOp {
  uint64_t offset = 0, length = 0;
  std::shared_ptr<StatusMap> status;
  std::function<void(StatusRequest&, const Failure*)> settle;
  bool is_done = false;
  void OnDone() override { is_done = true; }
};

// One flush of all workers that may have written.
struct FlushRequest {
  int open = 0;
  std::function<void(const Failure*)> settle;
};

// Executes plan windows with worker threads, one source and one sink connection each, under one
// supervisor thread that opens, watches and ends them. Calls may come from any thread and never wait.
class CopySession : public Stoppable, public std::enable_shared_from_this<CopySession> {
 public:
  explicit CopySession(SessionSpec spec);
  ~CopySession() override;

  // Once. Throws std::system_error when there is no thread to be had.
  void Open(const std::shared_ptr<ThreadGroup>& threads,
            std::function<void(const SessionFacts*, const Failure*)> on_open);
  void Submit(WindowSpec window, PlanWindow::Settle settle);
  void BlockStatus(std::unique_ptr<StatusRequest> request);
  void Flush(std::function<void(const Failure*)> settle);
  // Answers the place of whole clusters for so many bytes at the end of an appended file: theirs alone.
  uint64_t Reserve(uint64_t bytes);
  SessionProgress progress() const;
  void SetRateLimit(double bytes_per_second);
  // The first failure counts: everything outstanding and everything later ends with it.
  void Fail(const Failure& failure);
  void Close(std::function<void()> on_closed);
  void RequestStop() override;

  const SessionSpec& spec() const { return spec_; }

  // For the workers.
  enum class Next { kTask, kNone, kWait };
  Next NextTask(Task* task, int64_t* wait_ms);
  void TaskDone(const Task& task, const WindowOutcome& outcome);
  std::unique_ptr<StatusRequest> NextStatus();
  // From here on the worker takes part in flushes.
  void Joined(CopyWorker& worker);
  void Flushed(FlushRequest& flush);
  void Left(CopyWorker& worker);
  bool is_ending() const { return is_ending_.load(std::memory_order_relaxed); }
  bool has_failed() const { return has_failed_.load(std::memory_order_relaxed); }
  // What a request ends with that was not answered before the end.
  Failure EndFailure(const char* op) const;
  void CountRequest(int change) { requests_in_flight_ += change; }
  void CountConnections(int source, int sink) {
    source_connections_ += source;
    sink_connections_ += sink;
  }
  std::unique_ptr<CopySource> OpenSource(Wake& wake, Heart& heart) const;
  std::unique_ptr<CopySink> OpenSink(Wake& wake, Heart& heart, bool flushes) const;

 private:
  void Supervise(const std::function<void(const SessionFacts*, const Failure*)>& on_open);
  void OpenFiles();
  SessionFacts StartWorkers();
  int WorkerCount(const SessionFacts& facts) const;
  void WatchWorkers();
  void SettleComplete();
  void WakeWorkers();
  Failure ClosedFailure(const char* op) const;

  const SessionSpec spec_;
  std::shared_ptr<ThreadGroup> threads_;
  std::shared_ptr<FilesSource::Files> source_files_;
  std::shared_ptr<OpenFile> sink_file_;
  std::vector<std::shared_ptr<CopyWorker>> workers_;  // filled once, under the lock

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<PlanWindow>> windows_;  // not settled yet, in the order of submission
  std::deque<std::unique_ptr<StatusRequest>> statuses_;
  std::vector<std::shared_ptr<FlushRequest>> flushes_;
  std::vector<CopyWorker*> joined_;
  int running_workers_ = 0;
  bool has_supervisor_ = false;
  RateLimit rate_limit_;
  std::optional<Failure> failure_;
  std::vector<std::function<void()>> on_closed_;
  std::atomic<bool> is_ending_{false}, has_failed_{false};
  Wake opening_;

  std::atomic<uint64_t> append_end_;
  std::atomic<uint64_t> bytes_read_{0}, bytes_written_{0}, bytes_zeroed_{0}, bytes_skipped_{0};
  std::atomic<int> requests_in_flight_{0}, source_connections_{0}, sink_connections_{0};
};

}  // namespace holdfast
