#pragma once

#include <cstdint>
#include <vector>

#include "plan-window.h"

namespace holdfast {

// Adjacent clusters of a task with the same fate.
struct SinkRun {
  bool is_zero;
  uint64_t start, length;  // within the task
};

// Decides, cluster by cluster, what becomes of bytes that were read: hashes, verifies or compares, and
// finds the zeroes. Belongs to one thread.
class ClusterJudge {
 public:
  ClusterJudge(const DiskShape& shape, bool sink_keeps) : shape_(shape), sink_keeps_(sink_keeps), hasher_(shape.hash) {}

  // Fills `runs` with what must go to the sink and adds to `outcome`. Throws Failure HASH_MISMATCH,
  // before anything of the task is written.
  void Judge(const Task& task, const uint8_t* data, std::vector<SinkRun>* runs, WindowOutcome* outcome);

 private:
  enum class Verdict { kUnjudged, kEqual, kDifferent };
  Verdict Compare(const uint8_t* expected, const uint8_t* data, size_t length, bool is_zero);
  void Add(std::vector<SinkRun>* runs, bool is_zero, uint64_t start, uint64_t length) const;

  const DiskShape shape_;
  const bool sink_keeps_;  // false for the sink that throws everything away
  BlockHasher hasher_;
  bool is_hashed_ = false;
  uint8_t hash_[kMaxHashBytes];
};

}  // namespace holdfast
