#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io.h"
#include "nbd-connection.h"
#include "plan-window.h"

namespace holdfast {

// Room around the bytes of a request, for servers that want whole blocks.
constexpr size_t kBlockSlack = 65536;

// A request's memory: `data` is where the task's first byte lands, with kBlockSlack before and after.
struct RequestBuffer {
  explicit RequestBuffer(size_t request_bytes);
  uint8_t* data() { return memory.get() + kBlockSlack; }

  struct Free {
    void operator()(uint8_t* it) const;
  };
  std::unique_ptr<uint8_t, Free> memory;
};

// Where one worker reads. Calls are made on the worker's thread; they begin `io` and finish it, at once
// or when the worker polls `connection()`. What cannot be done at all is thrown as Failure.
class CopySource {
 public:
  virtual ~CopySource() = default;
  virtual void Read(const Task& task, RequestBuffer& buffer, Io& io) = 0;
  virtual NbdConnection* connection() { return nullptr; }
};

// Where one worker writes; the same rules. `buffer` belongs to the request until `io` is finished. A
// transfer may consist of several Write and Zero calls between Begin and Seal of the caller.
class CopySink {
 public:
  virtual ~CopySink() = default;
  virtual void Write(uint8_t* data, uint64_t length, uint64_t offset, Io& io) = 0;
  virtual void Zero(uint64_t length, uint64_t offset, Io& io) = 0;
  // Makes durable what this worker wrote.
  virtual void Flush(Io& io) = 0;
  virtual NbdConnection* connection() { return nullptr; }
};

// Says that a long synchronous step moves on; throws Failure when the work is to end.
class Heart {
 public:
  virtual ~Heart() = default;
  virtual void Beat() = 0;
};

class NbdSource : public CopySource {
 public:
  // Throws Failure when the export does not fit the disk.
  NbdSource(std::unique_ptr<NbdConnection> connection, const DiskShape& shape);
  void Read(const Task& task, RequestBuffer& buffer, Io& io) override;
  NbdConnection* connection() override { return connection_.get(); }

 private:
  std::unique_ptr<NbdConnection> connection_;
  uint64_t block_, most_;
};

class NbdSink : public CopySink {
 public:
  NbdSink(std::unique_ptr<NbdConnection> connection, const DiskShape& shape);
  void Write(uint8_t* data, uint64_t length, uint64_t offset, Io& io) override;
  void Zero(uint64_t length, uint64_t offset, Io& io) override;
  void Flush(Io& io) override;
  NbdConnection* connection() override { return connection_.get(); }

 private:
  uint64_t PaddedLength(uint64_t length, uint64_t offset) const;

  std::unique_ptr<NbdConnection> connection_;
  const DiskShape shape_;
  uint64_t block_, most_;
  std::vector<uint8_t> zeroes_;  // for a server that cannot zero
};

// A file or block device that stays open as long as anybody uses it.
class OpenFile {
 public:
  // Throws FILE_IO under the name `op`; what is neither a file nor a block device is refused.
  OpenFile(const std::string& path, int flags, const char* op);
  ~OpenFile();
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;
  int fd() const { return fd_; }
  uint64_t size() const { return size_; }
  bool is_device() const { return is_device_; }

 private:
  int fd_;
  uint64_t size_ = 0;
  bool is_device_ = false;
};

class FilesSource : public CopySource {
 public:
  using Files = std::vector<std::shared_ptr<OpenFile>>;
  FilesSource(std::shared_ptr<const Files> files, Heart& heart) : files_(std::move(files)), heart_(heart) {}
  void Read(const Task& task, RequestBuffer& buffer, Io& io) override;

 private:
  std::shared_ptr<const Files> files_;
  Heart& heart_;
};

struct FileSinkOptions {
  std::shared_ptr<OpenFile> file;
  // Where an appended file ends by now; else null, and bytes lie in the file as on the disk.
  const std::atomic<uint64_t>* append_end = nullptr;
  bool is_zeroed = false;
  bool flushes = false;  // one worker flushes for all: they share the file
  DiskShape shape;
};

class FileSink : public CopySink {
 public:
  FileSink(FileSinkOptions options, Heart& heart);
  void Write(uint8_t* data, uint64_t length, uint64_t offset, Io& io) override;
  void Zero(uint64_t length, uint64_t offset, Io& io) override;
  void Flush(Io& io) override;

 private:
  bool ZeroByKernel(uint64_t length, uint64_t offset);

  const FileSinkOptions options_;
  Heart& heart_;
  bool kernel_zeroes_ = true;
  std::vector<uint8_t> zeroes_;
};

class NullSink : public CopySink {
 public:
  void Write(uint8_t*, uint64_t, uint64_t, Io&) override {}
  void Zero(uint64_t, uint64_t, Io&) override {}
  void Flush(Io&) override {}
};

}  // namespace holdfast
