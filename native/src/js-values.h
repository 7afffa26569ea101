#pragma once

#include <napi.h>

#include <string>
#include <vector>

#include "nbd-connection.h"

namespace holdfast {

// From and to JavaScript. native/lib has checked the types; what is wrong here is a fault there.
std::string StringField(const Napi::Object& object, const char* name);
double NumberField(const Napi::Object& object, const char* name);
bool BoolField(const Napi::Object& object, const char* name);
std::vector<std::string> StringListField(const Napi::Object& object, const char* name);

// {uri, host, contexts, certificates, pskFile, username, connectTimeoutMs}
ConnectSpec ConnectSpecFrom(const Napi::Object& object);

Napi::Object ExportInfoObject(Napi::Env env, const ExportFacts& facts);
Napi::Object BlockStatusObject(Napi::Env env, const StatusMap& status);
Napi::Float64Array NumbersFrom(Napi::Env env, const std::vector<double>& numbers);
// A Buffer that owns the bytes, without copying them where Node allows it.
Napi::Value BufferFrom(Napi::Env env, std::vector<uint8_t> bytes);

}  // namespace holdfast
