#pragma once

#include <napi.h>

namespace holdfast {

Napi::Function DefineNbdHandle(Napi::Env env);

}  // namespace holdfast
