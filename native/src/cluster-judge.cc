#include "cluster-judge.h"

#include <algorithm>
#include <cstring>

#include "zero-detect.h"

namespace holdfast {

ClusterJudge::Verdict ClusterJudge::Compare(const uint8_t* expected, const uint8_t* data, size_t length, bool is_zero) {
  if (expected == nullptr) return Verdict::kUnjudged;
  switch (static_cast<ExpectKind>(expected[0])) {
    case ExpectKind::kUnknown:
      return Verdict::kUnjudged;
    case ExpectKind::kZero:
      return is_zero ? Verdict::kEqual : Verdict::kDifferent;
    case ExpectKind::kHash:
      break;
  }
  if (!is_hashed_) hasher_.Hash(data, length, hash_);
  is_hashed_ = true;
  return std::memcmp(hash_, expected + 1, hasher_.bytes()) == 0 ? Verdict::kEqual : Verdict::kDifferent;
}

void ClusterJudge::Judge(const Task& task, const uint8_t* data, std::vector<SinkRun>* runs, WindowOutcome* outcome) {
  PlanWindow& window = *task.window;
  const WindowSpec& spec = window.spec();
  size_t ordinal = 0;
  for (uint64_t at = 0; at < task.length; at += shape_.cluster_bytes, ordinal++) {
    const size_t length = std::min<uint64_t>(shape_.cluster_bytes, task.length - at);
    const uint8_t* bytes = data + at;
    const bool is_zero = IsZero(bytes, length);
    is_hashed_ = false;
    const Verdict verdict = Compare(window.expected(task.first_expect + ordinal), bytes, length, is_zero);
    if (spec.expect_policy == ExpectPolicy::kVerify && verdict == Verdict::kDifferent) {
      const double where = static_cast<double>(task.offset + at);
      if (!spec.collects_mismatches) {
        throw Failure("HASH_MISMATCH", "verify", "the bytes read differ from their recorded hash", 0, where);
      }
      outcome->mismatches.push_back(where);
    }
    const bool is_equal = spec.expect_policy == ExpectPolicy::kCompare && verdict == Verdict::kEqual;
    const bool is_skipped = is_equal || (is_zero && !spec.writes_zeroes);
    if (is_skipped || !sink_keeps_)
      outcome->bytes_skipped += length;
    else
      (is_zero ? outcome->bytes_zeroed : outcome->bytes_written) += length;
    if (is_skipped) continue;
    if (!is_zero && spec.emits_entries && !is_hashed_) hasher_.Hash(bytes, length, hash_);
    window.Emit(task.first_entry + ordinal, (task.offset + at) / shape_.cluster_bytes, is_zero ? nullptr : hash_);
    Add(runs, is_zero, at, length);
  }
  outcome->bytes_read += task.length;
}

void ClusterJudge::Add(std::vector<SinkRun>* runs, bool is_zero, uint64_t start, uint64_t length) const {
  if (!runs->empty()) {
    SinkRun& last = runs->back();
    if (last.is_zero == is_zero && last.start + last.length == start) {
      last.length += length;
      return;
    }
  }
  runs->push_back({is_zero, start, length});
}

}  // namespace holdfast
