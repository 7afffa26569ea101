#pragma once

#include <libnbd.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "failure.h"
#include "wake.h"

namespace holdfast {

struct ConnectSpec {
  std::string uri;
  std::string host;  // a name to resolve; empty for addresses and Unix sockets
  std::vector<std::string> contexts;
  std::string certificates, psk_file, username;
  int connect_timeout_ms = 0;
};

struct ExportFacts {
  uint64_t size = 0;
  bool is_read_only = false, can_multi_conn = false, can_flush = false, can_fua = false, can_zero = false,
       can_fast_zero = false, can_trim = false, can_cache = false, is_rotational = false, is_tls = false,
       is_structured = false;
  std::string protocol;
  uint64_t minimum_block = 0, preferred_block = 0, maximum_block = 0;  // 0 where the server does not say
  std::vector<std::string> contexts;
};

struct ExportEntry {
  std::string name, description;
};

// [length, flags, …] by context.
using StatusMap = std::map<std::string, std::vector<uint32_t>>;

// One request under way. `on_done` is called exactly once, on the thread that polls the connection and
// never from inside libnbd's own locks: it may issue further requests. Not called once the connection
// is destroyed.
struct NbdOp {
  virtual ~NbdOp() = default;
  virtual void OnDone() = 0;

  int error = 0;  // errno of the server's answer, 0 on success
};

// One connection to one export. Belongs to one thread at a time; that thread polls fd() for events()
// and hands what came to Notify(). The buffers of requests must outlive the connection or the request.
class NbdConnection {
 public:
  // Blocks the calling thread until the handshake is over, at most the spec's deadline, or until `wake`
  // is stopped. Throws Failure.
  static std::unique_ptr<NbdConnection> Open(const ConnectSpec& spec, Wake& wake);
  static std::vector<ExportEntry> ListExports(const ConnectSpec& spec, Wake& wake);

  // Closes the socket at once; requests under way are forgotten.
  ~NbdConnection();
  NbdConnection(const NbdConnection&) = delete;
  NbdConnection& operator=(const NbdConnection&) = delete;

  const ExportFacts& facts() const { return facts_; }
  int fd() const;
  short events() const;
  // Moves the protocol on and calls OnDone of what completed. Throws Failure when the connection is dead.
  void Notify(short revents);

  // Each throws Failure when libnbd refuses the request or the connection is dead.
  void Read(void* buffer, size_t length, uint64_t offset, NbdOp* op);
  void Write(const void* buffer, size_t length, uint64_t offset, uint32_t flags, NbdOp* op);
  void Zero(uint64_t length, uint64_t offset, uint32_t flags, NbdOp* op);
  void Trim(uint64_t length, uint64_t offset, uint32_t flags, NbdOp* op);
  void Cache(uint64_t length, uint64_t offset, NbdOp* op);
  void Flush(NbdOp* op);
  void BlockStatus(uint64_t length, uint64_t offset, std::shared_ptr<StatusMap> into, NbdOp* op);

  int in_flight() const { return in_flight_; }
  // When a request last completed, or the first of those under way was sent.
  int64_t last_progress_ms() const { return last_progress_ms_; }

  // Says goodbye and waits for the server to hang up, at most so long. For an idle connection.
  void Disconnect(int timeout_ms);
  // A larger socket send buffer, so that one request needs fewer wake-ups of the server. Unix sockets
  // only: TCP tunes its own.
  void GrowSendBuffer(int bytes);

 private:
  struct Pending;

  NbdConnection();
  void Configure(const ConnectSpec& spec);
  void Handshake(const ConnectSpec& spec, Wake& wake, int64_t deadline_ms);
  void ExpandContexts(const ConnectSpec& spec, Wake& wake, int64_t deadline_ms);
  void Go(Wake& wake, int64_t deadline_ms);
  void ReadFacts();
  template <typename Predicate>
  void PollUntil(Predicate is_reached, Wake& wake, int64_t deadline_ms);
  void Step(short revents);
  void RunCompleted();
  [[noreturn]] void ThrowConnect() const;
  [[noreturn]] void ThrowTimeout() const;
  void Issued(int64_t cookie, const char* op);
  nbd_completion_callback Completion(NbdOp* op);
  bool is_dead() const;

  nbd_handle* nbd_;
  ExportFacts facts_;
  std::vector<std::string> granted_candidates_;
  std::vector<NbdOp*> completed_;
  int in_flight_ = 0;
  int64_t last_progress_ms_ = 0;
};

}  // namespace holdfast
