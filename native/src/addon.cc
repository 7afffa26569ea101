#include <dlfcn.h>
#include <libnbd.h>
#include <napi.h>

#include <memory>

#include "addon-data.h"
#include "handle-glue.h"
#include "hash.h"
#include "session-glue.h"

namespace holdfast {

namespace {

constexpr int kStopMs = 2000;

// (algorithm, buffer) → Buffer
Napi::Value HashBlock(const Napi::CallbackInfo& info) {
  const HashKind kind = info[0].As<Napi::String>().Utf8Value() == "sha-256" ? HashKind::kSha256 : HashKind::kXxh3_128;
  auto data = info[1].As<Napi::Buffer<uint8_t>>();
  uint8_t hash[kMaxHashBytes];
  try {
    BlockHasher hasher(kind);
    hasher.Hash(data.Data(), data.Length(), hash);
  } catch (const Failure& failure) {
    throw Napi::Error::New(info.Env(), failure.message);
  }
  return Napi::Buffer<uint8_t>::Copy(info.Env(), hash, HashBytes(kind));
}

Napi::Value LibnbdVersion(const Napi::CallbackInfo& info) {
  std::unique_ptr<nbd_handle, decltype(&nbd_close)> handle(nbd_create(), nbd_close);
  const char* version = handle ? nbd_get_version(handle.get()) : nullptr;
  return Napi::String::New(info.Env(), version != nullptr ? version : "unknown");
}

// Threads may outlive the environment that loaded the library (a worker thread's end unloads it): the
// code they run must not go.
void StayLoaded() {
  Dl_info self;
  if (dladdr(reinterpret_cast<void*>(&StayLoaded), &self) != 0) dlopen(self.dli_fname, RTLD_NOW | RTLD_NODELETE);
}

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  StayLoaded();
  auto* data = new AddonData{std::make_shared<Mailbox>(env), std::make_shared<ThreadGroup>()};
  env.SetInstanceData(data);
  // Hooks run last in, first out: this one while the mailbox's own parts still stand.
  env.AddCleanupHook([mailbox = data->mailbox, threads = data->threads] {
    mailbox->Close();
    threads->StopAll(kStopMs);
  });
  exports["RawNbdHandle"] = DefineNbdHandle(env);
  exports["RawCopySession"] = DefineCopySession(env);
  exports["hashBlock"] = Napi::Function::New(env, HashBlock, "hashBlock");
  exports["libnbdVersion"] = Napi::Function::New(env, LibnbdVersion, "libnbdVersion");
  return exports;
}

}  // namespace

NODE_API_MODULE(holdfast_native, Init)

}  // namespace holdfast
