#include "plan-window.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace holdfast {

namespace {

// A zero row costs no buffer, so its tasks may be long; short enough for cancel and progress.
constexpr uint64_t kZeroTaskBytes = 32u << 20;
constexpr uint64_t kZeroBit = uint64_t{1} << 63;
constexpr uint64_t kNoEntry = ~uint64_t{0};
// Entries of a window are held at once: 4 Mi of them are 96 MiB with XXH3, 160 MiB with SHA-256.
constexpr uint64_t kMaxEntries = uint64_t{4} << 20;
constexpr double kMaxSafe = 9007199254740991.0;

bool IsCount(double value) { return value >= 0 && value <= kMaxSafe && std::floor(value) == value; }

std::string CheckRow(const double* row, const DiskShape& shape, double previous_end) {
  for (size_t i = 0; i < PlanWindow::kRowNumbers; i++)
    if (!IsCount(row[i])) return "every number must be a non-negative safe integer";
  const double end = row[0] + row[1];
  const double disk = static_cast<double>(shape.disk_bytes);
  if (row[1] == 0) return "a row must not be empty";
  if (end > disk) return "a row must end within the disk";
  if (std::fmod(row[0], shape.cluster_bytes) != 0) return "a row must begin at a cluster";
  if (std::fmod(row[1], shape.cluster_bytes) != 0 && end != disk)
    return "a row must end at a cluster or at the end of the disk";
  if (row[0] < previous_end) return "rows must be ascending and must not overlap";
  if (row[2] > 1) return "the op must be copy or zero";
  if (row[2] == 0 && shape.file_count > 0 && row[3] >= static_cast<double>(shape.file_count))
    return "there is no file with this index";
  if (!IsCount(row[4] + row[1])) return "the file offset is too large";
  return "";
}

}  // namespace

void WindowOutcome::Add(const WindowOutcome& other) {
  bytes_read += other.bytes_read;
  bytes_written += other.bytes_written;
  bytes_zeroed += other.bytes_zeroed;
  bytes_skipped += other.bytes_skipped;
  mismatches.insert(mismatches.end(), other.mismatches.begin(), other.mismatches.end());
}

std::string PlanWindow::Check(const WindowSpec& spec, const DiskShape& shape) {
  if (spec.rows.size() % kRowNumbers != 0) return "rows must hold five numbers each";
  double previous_end = 0;
  uint64_t clusters = 0, read_clusters = 0;
  for (size_t i = 0; i < spec.rows.size(); i += kRowNumbers) {
    const double* row = &spec.rows[i];
    std::string wrong = CheckRow(row, shape, previous_end);
    if (!wrong.empty()) return "row " + std::to_string(i / kRowNumbers) + ": " + wrong;
    previous_end = row[0] + row[1];
    const uint64_t count = (static_cast<uint64_t>(row[1]) + shape.cluster_bytes - 1) / shape.cluster_bytes;
    clusters += count;
    if (row[2] == 0) read_clusters += count;
  }
  if (shape.sink_places && !spec.emits_entries) return "an append sink needs a window with entries";
  if (spec.emits_entries && clusters > kMaxEntries) return "a window with entries may have at most 4194304 clusters";
  const uint64_t stride = 1 + HashBytes(shape.hash);
  if (spec.expect_policy != ExpectPolicy::kNone && spec.expect.size() != read_clusters * stride) {
    return "expect must hold one kind byte and one hash for each cluster of the copy rows";
  }
  for (size_t i = 0; i < spec.expect.size(); i += stride)
    if (spec.expect[i] > 2) return "expect holds an unknown kind";
  return "";
}

PlanWindow::PlanWindow(WindowSpec spec, const DiskShape& shape, Settle settle)
    : spec_(std::move(spec)), shape_(shape), settle_(std::move(settle)), entry_bytes_(8 + HashBytes(shape.hash)) {
  if (!spec_.emits_entries) return;
  uint64_t clusters = 0;
  for (size_t i = 0; i < spec_.rows.size() / kRowNumbers; i++) clusters += ClustersOf(RowAt(i).length);
  entries_.assign(clusters * entry_bytes_, 0xff);
  if (shape_.sink_places) places_.assign(clusters, 0);
}

PlanWindow::Row PlanWindow::RowAt(size_t index) const {
  const double* row = &spec_.rows[index * kRowNumbers];
  return {static_cast<uint64_t>(row[0]), static_cast<uint64_t>(row[1]), row[2] != 0, static_cast<size_t>(row[3]),
          static_cast<uint64_t>(row[4])};
}

uint64_t PlanWindow::next_read_bytes() const {
  if (is_cut()) return 0;
  const Row row = RowAt(row_);
  return row.is_zero ? 0 : std::min<uint64_t>(row.length - row_done_, shape_.request_bytes);
}

bool PlanWindow::Next(Task* task) {
  if (is_cut()) return false;
  const Row first = RowAt(row_);
  task->is_zero = first.is_zero;
  task->offset = first.offset + row_done_;
  task->length = 0;
  task->file = first.file;
  task->file_offset = first.file_offset + row_done_;
  task->first_entry = next_entry_;
  task->first_expect = next_expect_;
  // Requests end at multiples of their size, so that a long run is asked in equal, aligned pieces.
  const uint64_t limit = first.is_zero ? kZeroTaskBytes : shape_.request_bytes - task->offset % shape_.request_bytes;
  while (!is_cut() && task->length < limit) {
    const Row row = RowAt(row_);
    const bool continues =
        row.is_zero == task->is_zero && row.offset + row_done_ == task->offset + task->length &&
        (row.is_zero || shape_.file_count == 0 ||
         (row.file == task->file && row.file_offset + row_done_ == task->file_offset + task->length));
    if (!continues) break;
    const uint64_t piece = std::min(row.length - row_done_, limit - task->length);
    task->length += piece;
    row_done_ += piece;
    next_entry_ += ClustersOf(piece);
    if (!row.is_zero) next_expect_ += ClustersOf(piece);
    if (row_done_ == row.length) {
      row_++;
      row_done_ = 0;
    }
  }
  tasks_out_++;
  return true;
}

void PlanWindow::Finish(const WindowOutcome& outcome) {
  outcome_.Add(outcome);
  tasks_out_--;
}

const uint8_t* PlanWindow::expected(size_t ordinal) const {
  if (spec_.expect_policy == ExpectPolicy::kNone) return nullptr;
  return &spec_.expect[ordinal * (1 + HashBytes(shape_.hash))];
}

void PlanWindow::Emit(size_t ordinal, uint64_t cluster, const uint8_t* hash) {
  if (!spec_.emits_entries) return;
  uint8_t* entry = &entries_[ordinal * entry_bytes_];
  const uint64_t index = hash == nullptr ? cluster | kZeroBit : cluster;
  for (int i = 0; i < 8; i++) entry[i] = static_cast<uint8_t>(index >> (8 * i));
  if (hash == nullptr)
    std::memset(entry + 8, 0, entry_bytes_ - 8);
  else
    std::memcpy(entry + 8, hash, entry_bytes_ - 8);
}

void PlanWindow::Place(size_t ordinal, uint64_t length, uint64_t place) {
  for (uint64_t at = 0; at < length; at += shape_.cluster_bytes) places_[ordinal++] = static_cast<double>(place + at);
}

Entries PlanWindow::TakeEntries() {
  size_t kept = 0;
  for (size_t ordinal = 0; ordinal < entries_.size() / entry_bytes_; ordinal++) {
    uint64_t index;
    std::memcpy(&index, &entries_[ordinal * entry_bytes_], sizeof index);
    if (index == kNoEntry) continue;
    if (kept != ordinal) std::memmove(&entries_[kept * entry_bytes_], &entries_[ordinal * entry_bytes_], entry_bytes_);
    if (!places_.empty()) places_[kept] = places_[ordinal];
    kept++;
  }
  entries_.resize(kept * entry_bytes_);
  if (!places_.empty()) places_.resize(kept);
  return {std::move(entries_), std::move(places_)};
}

}  // namespace holdfast
