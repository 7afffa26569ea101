#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>

#include "failure.h"

namespace holdfast {

// Milliseconds of the monotonic clock.
inline int64_t NowMs() {
  using namespace std::chrono;
  return duration_cast<milliseconds>(steady_clock::now().time_since_epoch()).count();
}

// Wakes a thread out of poll(2), and carries the wish that it ends. Any thread may set it.
class Wake {
 public:
  Wake() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (fd_ < 0) throw FileFailure("eventfd", errno);
  }
  ~Wake() { ::close(fd_); }
  Wake(const Wake&) = delete;
  Wake& operator=(const Wake&) = delete;

  int fd() const { return fd_; }
  void Set() {
    const uint64_t one = 1;
    // Fails only when the counter is full, and then the reader wakes anyway.
    [[maybe_unused]] ssize_t n = ::write(fd_, &one, sizeof one);
  }
  void Drain() {
    uint64_t count;
    [[maybe_unused]] ssize_t n = ::read(fd_, &count, sizeof count);
  }
  void Stop() {
    stop_.store(true);
    Set();
  }
  bool stopped() const { return stop_.load(); }

 private:
  int fd_;
  std::atomic<bool> stop_{false};
};

}  // namespace holdfast
