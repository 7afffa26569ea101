#include "threads.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

namespace holdfast {

void ThreadGroup::Watch(const std::shared_ptr<Stoppable>& owner) {
  std::lock_guard lock(mutex_);
  std::erase_if(owners_, [](const auto& it) { return it.expired(); });
  owners_.push_back(owner);
}

void ThreadGroup::Start(std::function<void()> body) {
  std::lock_guard lock(mutex_);
  // Signals belong to Node's threads; SIGPIPE of a dead socket must not reach anybody.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    std::thread([group = shared_from_this(), body = std::move(body)]() mutable {
      body();
      body = nullptr;  // what the thread kept alive goes before it counts as ended
      std::lock_guard ended(group->mutex_);
      group->running_--;
      group->ended_.notify_all();
    }).detach();
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  running_++;
}

bool ThreadGroup::StopAll(int timeout_ms) {
  std::vector<std::shared_ptr<Stoppable>> alive;
  {
    std::lock_guard lock(mutex_);
    for (auto& owner : owners_)
      if (auto it = owner.lock()) alive.push_back(std::move(it));
  }
  for (auto& owner : alive) owner->RequestStop();
  alive.clear();
  std::unique_lock lock(mutex_);
  return ended_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [this] { return running_ == 0; });
}

}  // namespace holdfast
