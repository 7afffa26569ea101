#include "session-glue.h"

#include <algorithm>
#include <cerrno>
#include <memory>
#include <system_error>
#include <utility>

#include "addon-data.h"
#include "copy-session.h"
#include "js-values.h"

namespace holdfast {

namespace {

SessionSpec SessionSpecFrom(const Napi::Object& options) {
  SessionSpec spec;
  Napi::Object source = options.Get("source").As<Napi::Object>();
  if (StringField(source, "kind") == "nbd") {
    spec.source.nbd = ConnectSpecFrom(source);
    spec.source.connections = static_cast<int>(NumberField(source, "connections"));
  } else {
    spec.source.paths = StringListField(source, "paths");
  }
  Napi::Object sink = options.Get("sink").As<Napi::Object>();
  const std::string kind = StringField(sink, "kind");
  if (kind == "nbd") {
    spec.sink.kind = SinkSpec::Kind::kNbd;
    spec.sink.nbd = ConnectSpecFrom(sink);
    spec.sink.connections = static_cast<int>(NumberField(sink, "connections"));
  } else if (kind == "file") {
    spec.sink.kind = SinkSpec::Kind::kFile;
    spec.sink.path = StringField(sink, "path");
    spec.sink.is_zeroed = BoolField(sink, "isZeroed");
  } else if (kind == "append") {
    spec.sink.kind = SinkSpec::Kind::kAppend;
    spec.sink.path = StringField(sink, "path");
    spec.sink.start_offset = static_cast<uint64_t>(NumberField(sink, "startOffset"));
    spec.shape.sink_places = true;
  }
  spec.shape.disk_bytes = static_cast<uint64_t>(NumberField(options, "diskBytes"));
  spec.shape.cluster_bytes = static_cast<uint32_t>(NumberField(options, "clusterBytes"));
  spec.shape.request_bytes = static_cast<uint32_t>(NumberField(options, "requestBytes"));
  spec.shape.hash = StringField(options, "hash") == "sha-256" ? HashKind::kSha256 : HashKind::kXxh3_128;
  spec.shape.file_count = spec.source.paths.size();
  spec.requests_in_flight = static_cast<int>(NumberField(options, "requestsInFlight"));
  spec.rate_limit = NumberField(options, "rateLimitBytesPerSecond");
  spec.stall_timeout_ms = static_cast<int>(NumberField(options, "stallTimeoutMs"));
  return spec;
}

WindowSpec WindowSpecFrom(const Napi::Object& object) {
  WindowSpec spec;
  auto rows = object.Get("rows").As<Napi::Float64Array>();
  spec.rows.assign(rows.Data(), rows.Data() + rows.ElementLength());
  spec.writes_zeroes = StringField(object, "zeroPolicy") == "write";
  spec.emits_entries = BoolField(object, "emitEntries");
  const std::string policy = StringField(object, "expectPolicy");
  if (policy == "verify") spec.expect_policy = ExpectPolicy::kVerify;
  if (policy == "compare") spec.expect_policy = ExpectPolicy::kCompare;
  auto expect = object.Get("expect").As<Napi::Buffer<uint8_t>>();
  if (spec.expect_policy != ExpectPolicy::kNone) spec.expect.assign(expect.Data(), expect.Data() + expect.Length());
  spec.collects_mismatches = BoolField(object, "collectMismatches");
  return spec;
}

struct FinishedWindow {
  WindowOutcome outcome;
  Entries entries;
};

Napi::Object WindowResultObject(Napi::Env env, FinishedWindow& window) {
  Napi::Object result = Napi::Object::New(env);
  result["entries"] = BufferFrom(env, std::move(window.entries.packed));
  result["places"] = NumbersFrom(env, window.entries.places);
  result["bytesRead"] = Napi::Number::New(env, static_cast<double>(window.outcome.bytes_read));
  result["bytesWritten"] = Napi::Number::New(env, static_cast<double>(window.outcome.bytes_written));
  result["bytesZeroed"] = Napi::Number::New(env, static_cast<double>(window.outcome.bytes_zeroed));
  result["bytesSkipped"] = Napi::Number::New(env, static_cast<double>(window.outcome.bytes_skipped));
  auto& found = window.outcome.mismatches;
  std::sort(found.begin(), found.end());
  result["mismatches"] = NumbersFrom(env, found);
  return result;
}

// The JavaScript face of CopySession: the raw class that native/lib wraps.
class CopySessionObject : public Napi::ObjectWrap<CopySessionObject> {
 public:
  static Napi::Function Define(Napi::Env env) {
    return DefineClass(
        env, "RawCopySession",
        {InstanceMethod<&CopySessionObject::Open>("open"), InstanceMethod<&CopySessionObject::Submit>("submit"),
         InstanceMethod<&CopySessionObject::BlockStatus>("blockStatus"),
         InstanceMethod<&CopySessionObject::Reserve>("reserve"),
         InstanceMethod<&CopySessionObject::Progress>("progress"),
         InstanceMethod<&CopySessionObject::SetRateLimit>("setRateLimit"),
         InstanceMethod<&CopySessionObject::Flush>("flush"), InstanceMethod<&CopySessionObject::Cancel>("cancel"),
         InstanceMethod<&CopySessionObject::Close>("close")});
  }

  explicit CopySessionObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
    session_ = std::make_shared<CopySession>(SessionSpecFrom(info[0].As<Napi::Object>()));
  }
  ~CopySessionObject() override {
    if (session_) session_->RequestStop();
  }

 private:
  using Shared = std::shared_ptr<Settler>;

  static Shared Promise(Napi::Env env) { return std::make_shared<Settler>(env, AddonData::Of(env).mailbox); }

  Napi::Value Open(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    auto on_open = [settler](const SessionFacts* facts, const Failure* failure) {
      if (failure != nullptr) return settler->Reject(*failure);
      settler->Resolve([facts = *facts](Napi::Env env) {
        Napi::Object object = Napi::Object::New(env);
        if (facts.source) object["source"] = ExportInfoObject(env, *facts.source);
        if (facts.sink) object["sink"] = ExportInfoObject(env, *facts.sink);
        return object;
      });
    };
    try {
      session_->Open(AddonData::Of(info.Env()).threads, on_open);
    } catch (const std::system_error& error) {
      settler->Reject(Failure("FILE_IO", "open", error.what(), EAGAIN));
    }
    return settler->promise();
  }

  Napi::Value Submit(const Napi::CallbackInfo& info) {
    WindowSpec spec = WindowSpecFrom(info[0].As<Napi::Object>());
    const std::string wrong = PlanWindow::Check(spec, session_->spec().shape);
    if (!wrong.empty()) throw Napi::RangeError::New(info.Env(), wrong);
    Shared settler = Promise(info.Env());
    session_->Submit(std::move(spec), [settler](PlanWindow& window, const Failure* failure) {
      if (failure != nullptr) return settler->Reject(*failure);
      auto finished = std::make_shared<FinishedWindow>(FinishedWindow{window.outcome(), window.TakeEntries()});
      settler->Resolve([finished](Napi::Env env) { return WindowResultObject(env, *finished); });
    });
    return settler->promise();
  }

  Napi::Value BlockStatus(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    auto request = std::make_unique<StatusRequest>();
    request->offset = static_cast<uint64_t>(info[0].As<Napi::Number>().DoubleValue());
    request->length = static_cast<uint64_t>(info[1].As<Napi::Number>().DoubleValue());
    request->settle = [settler](StatusRequest& it, const Failure* failure) {
      if (failure != nullptr) return settler->Reject(*failure);
      settler->Resolve([status = it.status](Napi::Env env) { return BlockStatusObject(env, *status); });
    };
    session_->BlockStatus(std::move(request));
    return settler->promise();
  }

  Napi::Value Reserve(const Napi::CallbackInfo& info) {
    const uint64_t place = session_->Reserve(static_cast<uint64_t>(info[0].As<Napi::Number>().DoubleValue()));
    return Napi::Number::New(info.Env(), static_cast<double>(place));
  }

  Napi::Value Progress(const Napi::CallbackInfo& info) {
    Napi::Env env = info.Env();
    const SessionProgress now = session_->progress();
    Napi::Object object = Napi::Object::New(env);
    object["bytesRead"] = Napi::Number::New(env, static_cast<double>(now.bytes_read));
    object["bytesWritten"] = Napi::Number::New(env, static_cast<double>(now.bytes_written));
    object["bytesZeroed"] = Napi::Number::New(env, static_cast<double>(now.bytes_zeroed));
    object["bytesSkipped"] = Napi::Number::New(env, static_cast<double>(now.bytes_skipped));
    object["requestsInFlight"] = Napi::Number::New(env, now.requests_in_flight);
    object["sourceConnections"] = Napi::Number::New(env, now.source_connections);
    object["sinkConnections"] = Napi::Number::New(env, now.sink_connections);
    return object;
  }

  void SetRateLimit(const Napi::CallbackInfo& info) {
    session_->SetRateLimit(info[0].As<Napi::Number>().DoubleValue());
  }

  Napi::Value Flush(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    session_->Flush([settler](const Failure* failure) {
      if (failure != nullptr) return settler->Reject(*failure);
      settler->Resolve();
    });
    return settler->promise();
  }

  void Cancel(const Napi::CallbackInfo&) { session_->Fail(Cancelled("copy")); }

  Napi::Value Close(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    session_->Close([settler] { settler->Resolve(); });
    return settler->promise();
  }

  std::shared_ptr<CopySession> session_;
};

}  // namespace

Napi::Function DefineCopySession(Napi::Env env) { return CopySessionObject::Define(env); }

}  // namespace holdfast
