#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

namespace holdfast {

// Something with threads of its own that can be asked, from any thread and without waiting, to end them.
class Stoppable {
 public:
  virtual ~Stoppable() = default;
  virtual void RequestStop() = 0;
};

// The threads of one environment. Threads are detached and keep what they use alive through their
// closures; the environment's end asks all owners to stop and waits a bounded time for the last thread,
// so that a process that exits does not tear libraries down under running threads.
class ThreadGroup : public std::enable_shared_from_this<ThreadGroup> {
 public:
  void Watch(const std::shared_ptr<Stoppable>& owner);
  // `body` must not throw. Throws std::system_error when no thread can be started.
  void Start(std::function<void()> body);
  // False when threads still run after the time.
  bool StopAll(int timeout_ms);

 private:
  std::mutex mutex_;
  std::condition_variable ended_;
  int running_ = 0;
  std::vector<std::weak_ptr<Stoppable>> owners_;
};

}  // namespace holdfast
