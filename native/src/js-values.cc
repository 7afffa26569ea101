#include "js-values.h"

#include <algorithm>
#include <memory>
#include <utility>

namespace holdfast {

std::string StringField(const Napi::Object& object, const char* name) {
  return object.Get(name).As<Napi::String>().Utf8Value();
}

double NumberField(const Napi::Object& object, const char* name) {
  return object.Get(name).As<Napi::Number>().DoubleValue();
}

bool BoolField(const Napi::Object& object, const char* name) { return object.Get(name).As<Napi::Boolean>().Value(); }

std::vector<std::string> StringListField(const Napi::Object& object, const char* name) {
  Napi::Array array = object.Get(name).As<Napi::Array>();
  std::vector<std::string> list;
  for (uint32_t i = 0; i < array.Length(); i++) list.push_back(array.Get(i).As<Napi::String>().Utf8Value());
  return list;
}

ConnectSpec ConnectSpecFrom(const Napi::Object& object) {
  ConnectSpec spec;
  spec.uri = StringField(object, "uri");
  spec.host = StringField(object, "host");
  spec.contexts = StringListField(object, "metaContexts");
  spec.certificates = StringField(object, "certificates");
  spec.psk_file = StringField(object, "pskFile");
  spec.username = StringField(object, "username");
  spec.connect_timeout_ms = static_cast<int>(NumberField(object, "connectTimeoutMs"));
  return spec;
}

Napi::Object ExportInfoObject(Napi::Env env, const ExportFacts& facts) {
  Napi::Object info = Napi::Object::New(env);
  info["sizeBytes"] = Napi::Number::New(env, static_cast<double>(facts.size));
  info["isReadOnly"] = facts.is_read_only;
  info["canMultiConn"] = facts.can_multi_conn;
  info["canFlush"] = facts.can_flush;
  info["canFua"] = facts.can_fua;
  info["canZero"] = facts.can_zero;
  info["canFastZero"] = facts.can_fast_zero;
  info["canTrim"] = facts.can_trim;
  info["canCache"] = facts.can_cache;
  info["isRotational"] = facts.is_rotational;
  info["isTls"] = facts.is_tls;
  info["isStructured"] = facts.is_structured;
  info["protocol"] = facts.protocol;
  Napi::Object block = Napi::Object::New(env);
  block["minimum"] = Napi::Number::New(env, static_cast<double>(facts.minimum_block));
  block["preferred"] = Napi::Number::New(env, static_cast<double>(facts.preferred_block));
  block["maximum"] = Napi::Number::New(env, static_cast<double>(facts.maximum_block));
  info["blockSize"] = block;
  Napi::Array contexts = Napi::Array::New(env, facts.contexts.size());
  for (uint32_t i = 0; i < facts.contexts.size(); i++) contexts[i] = Napi::String::New(env, facts.contexts[i]);
  info["metaContexts"] = contexts;
  return info;
}

Napi::Object BlockStatusObject(Napi::Env env, const StatusMap& status) {
  Napi::Object object = Napi::Object::New(env);
  for (const auto& [context, entries] : status) {
    Napi::Float64Array list = Napi::Float64Array::New(env, entries.size());
    for (size_t i = 0; i < entries.size(); i++) list[i] = entries[i];
    object[context] = list;
  }
  return object;
}

Napi::Float64Array NumbersFrom(Napi::Env env, const std::vector<double>& numbers) {
  Napi::Float64Array list = Napi::Float64Array::New(env, numbers.size());
  std::copy(numbers.begin(), numbers.end(), list.Data());
  return list;
}

Napi::Value BufferFrom(Napi::Env env, std::vector<uint8_t> bytes) {
  auto owned = std::make_unique<std::vector<uint8_t>>(std::move(bytes));
  auto* raw = owned.get();
  auto buffer = Napi::Buffer<uint8_t>::NewOrCopy(
      env, raw->data(), raw->size(), [](Napi::Env, uint8_t*, std::vector<uint8_t>* it) { delete it; }, raw);
  owned.release();
  return buffer;
}

}  // namespace holdfast
