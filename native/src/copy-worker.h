#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "cluster-judge.h"
#include "copy-endpoints.h"
#include "copy-session.h"

namespace holdfast {

// One thread of a copy session: a source and a sink of its own and one poll loop. Takes tasks from the
// session while it has buffers, and carries each through read, judge and write.
class CopyWorker : private Heart {
 public:
  CopyWorker(CopySession& session, int index);
  ~CopyWorker() override;

  // Opens source and sink; throws Failure.
  void Connect(Wake& wake);
  // The thread's body. Connects first if that has not been done; an extra worker that gets no
  // connection just ends, the session goes on with fewer.
  void Run();

  NbdConnection* source_connection() { return source_->connection(); }
  NbdConnection* sink_connection() { return sink_->connection(); }
  Wake& wake() { return wake_; }
  int index() const { return index_; }
  // Any thread: true while one system call takes longer than that.
  bool is_stuck(int64_t timeout_ms) const;
  // Under the session's lock.
  void QueueFlush(std::shared_ptr<FlushRequest> flush);

 private:
  struct Slot;
  struct FlushIo;

  void Beat() override;
  bool ConnectExtra();
  void Loop();
  void Fill();
  void Start(Slot& slot);
  void AfterRead(Slot& slot);
  uint64_t PlaceOf(const Task& task, const SinkRun& run);
  void Finish(Slot& slot);
  void RunReady();
  void TakeStatuses();
  void SettleStatuses();
  void TakeFlushes();
  void SettleFlushes();
  void Poll();
  int PollTimeout() const;
  void CheckStall(NbdConnection* connection, const char* role) const;
  Slot* FreeSlot();

  CopySession& session_;
  const int index_;
  Wake wake_;
  std::atomic<int64_t> busy_since_ms_{0};
  ClusterJudge judge_;
  int64_t rate_wait_ms_ = 0;

  // Buffers first: they must outlive the connections that were told to fill them.
  std::vector<std::unique_ptr<Slot>> slots_;
  std::vector<Slot*> free_, ready_;
  std::vector<std::unique_ptr<StatusRequest>> statuses_;
  std::vector<std::unique_ptr<FlushIo>> flushing_;
  std::unique_ptr<CopySource> source_;
  std::unique_ptr<CopySink> sink_;

  std::mutex flush_mutex_;
  std::vector<std::shared_ptr<FlushRequest>> queued_flushes_;
};

}  // namespace holdfast
