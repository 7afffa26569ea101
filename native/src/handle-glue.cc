#include "handle-glue.h"

#include <memory>
#include <system_error>
#include <utility>

#include "addon-data.h"
#include "js-values.h"
#include "nbd-handle.h"

namespace holdfast {

namespace {

// The JavaScript face of NbdHandleCore: the raw class that native/lib wraps.
class NbdHandleObject : public Napi::ObjectWrap<NbdHandleObject> {
 public:
  static Napi::Function Define(Napi::Env env) {
    return DefineClass(
        env, "RawNbdHandle",
        {InstanceMethod<&NbdHandleObject::Open>("open"), InstanceMethod<&NbdHandleObject::List>("listExports"),
         InstanceMethod<&NbdHandleObject::Read>("pread"), InstanceMethod<&NbdHandleObject::Write>("pwrite"),
         InstanceMethod<&NbdHandleObject::Ranged<HandleCall::kZero>>("zero"),
         InstanceMethod<&NbdHandleObject::Ranged<HandleCall::kTrim>>("trim"),
         InstanceMethod<&NbdHandleObject::Ranged<HandleCall::kCache>>("cache"),
         InstanceMethod<&NbdHandleObject::Ranged<HandleCall::kFlush>>("flush"),
         InstanceMethod<&NbdHandleObject::BlockStatus>("blockStatus"),
         InstanceMethod<&NbdHandleObject::Close>("close")});
  }

  explicit NbdHandleObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {
    Napi::Object options = info[0].As<Napi::Object>();
    core_ = std::make_shared<NbdHandleCore>(ConnectSpecFrom(options),
                                            static_cast<int>(NumberField(options, "requestTimeoutMs")));
  }
  ~NbdHandleObject() override {
    if (core_) core_->RequestStop();
  }

 private:
  using Shared = std::shared_ptr<Settler>;

  static Shared Promise(Napi::Env env) { return std::make_shared<Settler>(env, AddonData::Of(env).mailbox); }

  template <typename Start>
  static Napi::Value Started(const Shared& settler, Start start) {
    try {
      start();
    } catch (const std::system_error& error) {
      settler->Reject(Failure("NBD_CONNECT", "connect", error.what(), EAGAIN));
    }
    return settler->promise();
  }

  Napi::Value Open(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    return Started(settler, [&] {
      core_->Open(*AddonData::Of(info.Env()).threads, [settler](const ExportFacts* facts, const Failure* failure) {
        if (failure != nullptr) return settler->Reject(*failure);
        settler->Resolve([facts = *facts](Napi::Env env) { return ExportInfoObject(env, facts); });
      });
    });
  }

  Napi::Value List(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    return Started(settler, [&] {
      core_->List(*AddonData::Of(info.Env()).threads,
                  [settler](const std::vector<ExportEntry>* entries, const Failure* failure) {
                    if (failure != nullptr) return settler->Reject(*failure);
                    settler->Resolve([entries = *entries](Napi::Env env) { return EntriesArray(env, entries); });
                  });
    });
  }

  static Napi::Value EntriesArray(Napi::Env env, const std::vector<ExportEntry>& entries) {
    Napi::Array array = Napi::Array::New(env, entries.size());
    for (uint32_t i = 0; i < entries.size(); i++) {
      Napi::Object entry = Napi::Object::New(env);
      entry["name"] = entries[i].name;
      entry["description"] = entries[i].description;
      array[i] = entry;
    }
    return array;
  }

  static std::unique_ptr<HandleRequest> Request(HandleCall call, const Napi::CallbackInfo& info) {
    auto request = std::make_unique<HandleRequest>();
    request->call = call;
    if (info.Length() > 0) request->offset = static_cast<uint64_t>(info[0].As<Napi::Number>().DoubleValue());
    return request;
  }

  Napi::Value Read(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    auto request = Request(HandleCall::kRead, info);
    request->buffer.resize(info[1].As<Napi::Number>().Uint32Value());
    request->settle = [settler](HandleRequest& it, const Failure* failure) {
      if (failure != nullptr) return settler->Reject(*failure);
      auto bytes = std::make_shared<std::vector<uint8_t>>(std::move(it.buffer));
      settler->Resolve([bytes](Napi::Env env) { return BufferFrom(env, std::move(*bytes)); });
    };
    core_->Submit(std::move(request));
    return settler->promise();
  }

  Napi::Value Write(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    auto request = Request(HandleCall::kWrite, info);
    // A copy: the caller may change its buffer, or the environment may end, while the request is under way.
    auto data = info[1].As<Napi::Buffer<uint8_t>>();
    request->buffer.assign(data.Data(), data.Data() + data.Length());
    request->flags = info[2].As<Napi::Number>().Uint32Value();
    request->settle = SettleVoid(settler);
    core_->Submit(std::move(request));
    return settler->promise();
  }

  // (offset, length, flags), or nothing for flush.
  template <HandleCall kCall>
  Napi::Value Ranged(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    auto request = Request(kCall, info);
    if (info.Length() > 1) request->length = static_cast<uint64_t>(info[1].As<Napi::Number>().DoubleValue());
    if (info.Length() > 2) request->flags = info[2].As<Napi::Number>().Uint32Value();
    request->settle = SettleVoid(settler);
    core_->Submit(std::move(request));
    return settler->promise();
  }

  Napi::Value BlockStatus(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    auto request = Request(HandleCall::kBlockStatus, info);
    request->length = static_cast<uint64_t>(info[1].As<Napi::Number>().DoubleValue());
    request->settle = [settler](HandleRequest& it, const Failure* failure) {
      if (failure != nullptr) return settler->Reject(*failure);
      settler->Resolve([status = it.status](Napi::Env env) { return BlockStatusObject(env, *status); });
    };
    core_->Submit(std::move(request));
    return settler->promise();
  }

  Napi::Value Close(const Napi::CallbackInfo& info) {
    Shared settler = Promise(info.Env());
    core_->Close([settler] { settler->Resolve(); });
    return settler->promise();
  }

  static std::function<void(HandleRequest&, const Failure*)> SettleVoid(const Shared& settler) {
    return [settler](HandleRequest&, const Failure* failure) {
      if (failure != nullptr) return settler->Reject(*failure);
      settler->Resolve();
    };
  }

  std::shared_ptr<NbdHandleCore> core_;
};

}  // namespace

Napi::Function DefineNbdHandle(Napi::Env env) { return NbdHandleObject::Define(env); }

}  // namespace holdfast
