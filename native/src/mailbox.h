#pragma once

#include <napi.h>

#include <deque>
#include <functional>
#include <memory>
#include <mutex>

#include "failure.h"

namespace holdfast {

// The way from the addon's threads back to the JavaScript thread of one environment. Messages run
// there in the order they were posted. After Close() they are dropped, so a thread that outlives its
// environment does no harm.
class Mailbox {
 public:
  using Message = std::function<void(Napi::Env)>;

  explicit Mailbox(Napi::Env env);

  // From any thread.
  void Post(Message message);

  // JavaScript thread only: while promises are outstanding the event loop stays alive.
  void Hold(Napi::Env env);
  void Unhold(Napi::Env env);

  // JavaScript thread only, from the environment's cleanup hook.
  void Close();

 private:
  void Drain(Napi::Env env);

  std::mutex mutex_;
  std::deque<Message> messages_;
  bool is_closed_ = false;
  bool is_woken_ = false;
  int holds_ = 0;
  Napi::ThreadSafeFunction wake_;
};

// A promise that any thread may settle, once. Later calls do nothing.
class Settler {
 public:
  using MakeValue = std::function<Napi::Value(Napi::Env)>;

  Settler(Napi::Env env, std::shared_ptr<Mailbox> mailbox);

  Napi::Promise promise() const { return deferred_.Promise(); }
  void Resolve(MakeValue make_value = nullptr);
  void Reject(const Failure& failure);

 private:
  bool Claim();

  std::shared_ptr<Mailbox> mailbox_;
  Napi::Promise::Deferred deferred_;
  std::mutex mutex_;
  bool is_settled_ = false;
};

// The plain object that native/lib turns into an NbdError.
Napi::Object FailureObject(Napi::Env env, const Failure& failure);

}  // namespace holdfast
