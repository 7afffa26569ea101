#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "nbd-connection.h"
#include "threads.h"

namespace holdfast {

enum class HandleCall { kRead, kWrite, kZero, kTrim, kCache, kFlush, kBlockStatus };

// One call on a handle. `settle` runs on the handle's thread, once: with null on success.
struct HandleRequest : NbdOp {
  HandleCall call = HandleCall::kFlush;
  uint64_t offset = 0;
  uint64_t length = 0;
  uint32_t flags = 0;
  std::vector<uint8_t> buffer;
  std::shared_ptr<StatusMap> status;
  std::function<void(HandleRequest&, const Failure*)> settle;
  int64_t deadline_ms = 0;
  bool is_done = false;

  void OnDone() override { is_done = true; }
  const char* name() const;
};

// One connection and the thread that polls it. All calls may come from any thread and never wait.
class NbdHandleCore : public Stoppable, public std::enable_shared_from_this<NbdHandleCore> {
 public:
  using OnOpen = std::function<void(const ExportFacts*, const Failure*)>;
  using OnList = std::function<void(const std::vector<ExportEntry>*, const Failure*)>;

  NbdHandleCore(ConnectSpec spec, int request_timeout_ms);

  // Start the thread, once; throws std::system_error when there is none to be had.
  void Open(ThreadGroup& threads, OnOpen on_open);
  void List(ThreadGroup& threads, OnList on_list);

  void Submit(std::unique_ptr<HandleRequest> request);
  // Rejects what is under way with NBD_CLOSED and ends the thread; `on_closed` runs when it has ended.
  void Close(std::function<void()> on_closed);
  void RequestStop() override { wake_.Stop(); }

 private:
  void Run(const OnOpen& on_open);
  void Serve(NbdConnection& connection);
  void Take(NbdConnection& connection);
  void Issue(NbdConnection& connection, HandleRequest& request);
  void SettleDone();
  int64_t NextDeadline() const;
  void CheckDeadlines();
  // From now on every request, under way or to come, ends with this failure.
  void End(const Failure& failure);
  void Ended();

  const ConnectSpec spec_;
  const int request_timeout_ms_;
  Wake wake_;
  std::vector<std::unique_ptr<HandleRequest>> under_way_;  // the thread's own

  std::mutex mutex_;
  std::deque<std::unique_ptr<HandleRequest>> submitted_;
  std::optional<Failure> end_;
  bool has_thread_ = false;
  std::vector<std::function<void()>> on_closed_;
};

}  // namespace holdfast
