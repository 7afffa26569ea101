#include "mailbox.h"

#include <utility>

namespace holdfast {

Mailbox::Mailbox(Napi::Env env)
    : wake_(Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}),
                                          "holdfast_native", 0, 1)) {
  wake_.Unref(env);
}

void Mailbox::Post(Message message) {
  std::lock_guard lock(mutex_);
  if (is_closed_) return;
  messages_.push_back(std::move(message));
  if (is_woken_) return;
  is_woken_ = true;
  wake_.NonBlockingCall([this](Napi::Env env, Napi::Function) { Drain(env); });
}

void Mailbox::Drain(Napi::Env env) {
  std::deque<Message> batch;
  {
    std::lock_guard lock(mutex_);
    batch.swap(messages_);
    is_woken_ = false;
  }
  for (auto& message : batch) {
    Napi::HandleScope scope(env);
    try {
      message(env);
    } catch (const Napi::Error&) {
      // Only an environment that is being torn down refuses to settle a promise: nobody waits any more.
    }
  }
}

void Mailbox::Hold(Napi::Env env) {
  if (holds_++ == 0) wake_.Ref(env);
}

void Mailbox::Unhold(Napi::Env env) {
  if (--holds_ == 0) wake_.Unref(env);
}

void Mailbox::Close() {
  std::lock_guard lock(mutex_);
  if (is_closed_) return;
  is_closed_ = true;
  messages_.clear();
  wake_.Abort();
}

Settler::Settler(Napi::Env env, std::shared_ptr<Mailbox> mailbox)
    : mailbox_(std::move(mailbox)), deferred_(Napi::Promise::Deferred::New(env)) {
  mailbox_->Hold(env);
}

bool Settler::Claim() {
  std::lock_guard lock(mutex_);
  return !std::exchange(is_settled_, true);
}

void Settler::Resolve(MakeValue make_value) {
  if (!Claim()) return;
  mailbox_->Post([mailbox = mailbox_, deferred = deferred_, make_value = std::move(make_value)](Napi::Env env) {
    mailbox->Unhold(env);
    deferred.Resolve(make_value ? make_value(env) : env.Undefined());
  });
}

void Settler::Reject(const Failure& failure) {
  if (!Claim()) return;
  mailbox_->Post([mailbox = mailbox_, deferred = deferred_, failure](Napi::Env env) {
    mailbox->Unhold(env);
    deferred.Reject(FailureObject(env, failure));
  });
}

Napi::Object FailureObject(Napi::Env env, const Failure& failure) {
  Napi::Object object = Napi::Object::New(env);
  object["code"] = Napi::String::New(env, failure.code);
  object["op"] = Napi::String::New(env, failure.op);
  object["message"] = Napi::String::New(env, failure.message);
  object["errno"] = Napi::Number::New(env, failure.error);
  if (failure.offset >= 0) object["offset"] = Napi::Number::New(env, failure.offset);
  return object;
}

}  // namespace holdfast
