#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "failure.h"
#include "hash.h"

namespace holdfast {

enum class ExpectPolicy { kNone, kVerify, kCompare };
enum class ExpectKind : uint8_t { kUnknown = 0, kHash = 1, kZero = 2 };

struct DiskShape {
  uint64_t disk_bytes = 0;
  uint32_t cluster_bytes = 0;
  uint32_t request_bytes = 0;
  HashKind hash = HashKind::kXxh3_128;
  size_t file_count = 0;     // 0 for an NBD source
  bool sink_places = false;  // the sink decides where bytes go, and the result says where
};

struct WindowSpec {
  std::vector<double> rows;  // [offset, length, op, fileIndex, fileOffset] × n
  bool writes_zeroes = false;
  bool emits_entries = false;
  ExpectPolicy expect_policy = ExpectPolicy::kNone;
  std::vector<uint8_t> expect;
  bool collects_mismatches = false;
};

struct WindowOutcome {
  uint64_t bytes_read = 0, bytes_written = 0, bytes_zeroed = 0, bytes_skipped = 0;
  std::vector<double> mismatches;

  void Add(const WindowOutcome& other);
};

struct Entries {
  std::vector<uint8_t> packed;
  std::vector<double> places;
};

class PlanWindow;

// A run of whole clusters (the last may be cut by the end of the disk) for one worker.
struct Task {
  std::shared_ptr<PlanWindow> window;
  bool is_zero = false;
  uint64_t offset = 0, length = 0;
  size_t file = 0;
  uint64_t file_offset = 0;
  size_t first_entry = 0;   // place of its first cluster among all clusters of the window
  size_t first_expect = 0;  // and among the clusters that are read
};

// One submitted window: cuts its rows into tasks, and collects what they found. Next() and Finish()
// are called under the session's lock; entries and expectations of different tasks are different
// memory, so workers use them without it.
class PlanWindow {
 public:
  using Settle = std::function<void(PlanWindow&, const Failure*)>;

  // Empty when the window can be executed, else what is wrong with it.
  static std::string Check(const WindowSpec& spec, const DiskShape& shape);

  PlanWindow(WindowSpec spec, const DiskShape& shape, Settle settle);

  // The next task; false when all have been handed out.
  bool Next(Task* task);
  void Finish(const WindowOutcome& outcome);
  bool is_cut() const { return row_ * kRowNumbers >= spec_.rows.size(); }
  bool is_complete() const { return is_cut() && tasks_out_ == 0; }
  // Bytes the next task will read, for the rate limit; 0 when it reads nothing.
  uint64_t next_read_bytes() const;

  const WindowSpec& spec() const { return spec_; }
  // Kind byte and hash of a cluster that is read, or null when nothing is expected.
  const uint8_t* expected(size_t ordinal) const;
  // Records that the sink now holds this cluster; null hash for a zero cluster.
  void Emit(size_t ordinal, uint64_t cluster, const uint8_t* hash);
  // Records that the clusters from this one on, `length` bytes, went to the sink's file at `place`.
  void Place(size_t ordinal, uint64_t length, uint64_t place);
  // What was recorded, ascending; a place for each entry, or none at all. To be called once, when complete.
  Entries TakeEntries();
  WindowOutcome& outcome() { return outcome_; }
  void SettleWith(const Failure* failure) { settle_(*this, failure); }

  static constexpr size_t kRowNumbers = 5;

 private:
  struct Row {
    uint64_t offset, length;
    bool is_zero;
    size_t file;
    uint64_t file_offset;
  };
  Row RowAt(size_t index) const;
  uint64_t ClustersOf(uint64_t bytes) const { return (bytes + shape_.cluster_bytes - 1) / shape_.cluster_bytes; }

  WindowSpec spec_;
  const DiskShape shape_;
  Settle settle_;
  size_t row_ = 0;
  uint64_t row_done_ = 0;  // bytes of that row already handed out
  size_t next_entry_ = 0, next_expect_ = 0;
  size_t tasks_out_ = 0;
  size_t entry_bytes_;
  std::vector<uint8_t> entries_;
  std::vector<double> places_;
  WindowOutcome outcome_;
};

}  // namespace holdfast
