#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace holdfast {

// A token bucket over bytes that allows a quarter of a second of burst. Not locked: the owner does.
class RateLimit {
 public:
  void Set(double bytes_per_second) {
    rate_ = bytes_per_second;
    tokens_ = std::min(tokens_, Burst());
  }
  // 0 when `bytes` may go now (and then they are counted), else milliseconds to wait.
  int64_t Take(uint64_t bytes, int64_t now_ms) {
    if (rate_ <= 0) return 0;
    tokens_ = std::min(Burst(), tokens_ + rate_ * static_cast<double>(now_ms - last_ms_) / 1000.0);
    last_ms_ = now_ms;
    // A request larger than the bucket goes when the bucket is not in debt, and puts it in debt.
    if (tokens_ <= 0) return std::max<int64_t>(1, static_cast<int64_t>(std::ceil(-tokens_ * 1000.0 / rate_)));
    tokens_ -= static_cast<double>(bytes);
    return 0;
  }

 private:
  double Burst() const { return rate_ / 4; }

  double rate_ = 0;
  double tokens_ = 0;
  int64_t last_ms_ = 0;
};

}  // namespace holdfast
