#pragma once

#include <napi.h>

namespace holdfast {

Napi::Function DefineCopySession(Napi::Env env);

}  // namespace holdfast
