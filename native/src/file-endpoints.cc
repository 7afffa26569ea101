#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "copy-endpoints.h"

namespace holdfast {

namespace {
constexpr uint64_t kFlushStep = 64u << 20;
constexpr uint64_t kSector = 512;
}  // namespace

OpenFile::OpenFile(const std::string& path, int flags, const char* op)
    // O_NONBLOCK: a FIFO in place of the file must not block the thread; it means nothing for files.
    : fd_(::open(path.c_str(), flags | O_CLOEXEC | O_NONBLOCK)) {
  if (fd_ < 0) throw FileFailure(op, errno);
  struct stat facts;
  if (fstat(fd_, &facts) != 0) {
    const int error = errno;
    ::close(fd_);
    throw FileFailure(op, error);
  }
  is_device_ = S_ISBLK(facts.st_mode);
  size_ = static_cast<uint64_t>(facts.st_size);
  int error = is_device_ || S_ISREG(facts.st_mode) ? 0 : EINVAL;
  if (is_device_ && ioctl(fd_, BLKGETSIZE64, &size_) != 0) error = errno;
  if (error != 0) {
    ::close(fd_);
    throw FileFailure(op, error);
  }
}

OpenFile::~OpenFile() { ::close(fd_); }

void FilesSource::Read(const Task& task, RequestBuffer& buffer, Io& io) {
  io.Begin("pread");
  const int fd = (*files_)[task.file]->fd();
  uint64_t done = 0;
  while (done < task.length) {
    heart_.Beat();
    const ssize_t n =
        ::pread(fd, buffer.data() + done, task.length - done, static_cast<off_t>(task.file_offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw FileFailure("pread", errno, static_cast<double>(task.offset + done));
    if (n == 0) {
      // A QCOW2 file may end inside its last cluster: what lies beyond reads as zeroes, as in QEMU.
      std::memset(buffer.data() + done, 0, task.length - done);
      break;
    }
    done += static_cast<uint64_t>(n);
  }
  io.Seal();
}

FileSink::FileSink(FileSinkOptions options, Heart& heart) : options_(std::move(options)), heart_(heart) {
  if (options_.append_end == nullptr && options_.file->size() < options_.shape.disk_bytes) {
    throw Failure("NBD_REQUEST", "open",
                  "the target holds " + std::to_string(options_.file->size()) + " bytes, fewer than the " +
                      std::to_string(options_.shape.disk_bytes) + " of the disk",
                  ENOSPC);
  }
}

void FileSink::Write(uint8_t* data, uint64_t length, uint64_t offset, Io&) {
  uint64_t done = 0;
  while (done < length) {
    heart_.Beat();
    const ssize_t n = ::pwrite(options_.file->fd(), data + done, length - done, static_cast<off_t>(offset + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw FileFailure("pwrite", errno, static_cast<double>(offset + done));
    done += static_cast<uint64_t>(n);
  }
}

bool FileSink::ZeroByKernel(uint64_t length, uint64_t offset) {
  if (!kernel_zeroes_) return false;
  const int fd = options_.file->fd();
  if (options_.file->is_device()) {
    uint64_t range[2] = {offset, length};
    if (offset % kSector != 0 || length % kSector != 0) return false;
    kernel_zeroes_ = ioctl(fd, BLKZEROOUT, range) == 0;
  } else {
    kernel_zeroes_ = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                               static_cast<off_t>(length)) == 0;
  }
  if (kernel_zeroes_) return true;
  if (errno != EOPNOTSUPP && errno != ENOTTY && errno != EINVAL) {
    throw FileFailure("zero", errno, static_cast<double>(offset));
  }
  return false;
}

void FileSink::Zero(uint64_t length, uint64_t offset, Io& io) {
  if (options_.is_zeroed) return;
  heart_.Beat();
  if (ZeroByKernel(length, offset)) return;
  zeroes_.resize(options_.shape.request_bytes);
  for (uint64_t at = 0; at < length; at += zeroes_.size()) {
    Write(zeroes_.data(), std::min<uint64_t>(zeroes_.size(), length - at), offset + at, io);
  }
}

void FileSink::Flush(Io&) {
  if (!options_.flushes) return;
  const int fd = options_.file->fd();
  // In steps, so that a slow disk shows progress and a cancel is heard; then once for the metadata.
  const uint64_t end = options_.append_end == nullptr ? options_.shape.disk_bytes : options_.append_end->load();
  for (uint64_t at = 0; at < end; at += kFlushStep) {
    heart_.Beat();
    const unsigned all = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
    if (sync_file_range(fd, static_cast<off_t>(at), kFlushStep, all) != 0) {
      if (errno == EINVAL || errno == ENOSYS || errno == ESPIPE) break;  // this filesystem has fdatasync alone
      throw FileFailure("flush", errno, static_cast<double>(at));
    }
  }
  heart_.Beat();
  if (fdatasync(fd) != 0) throw FileFailure("flush", errno);
}

}  // namespace holdfast
