#pragma once

#include <napi.h>

#include <memory>

#include "mailbox.h"
#include "threads.h"

namespace holdfast {

// What one environment (main thread or worker) has: its way back and its threads.
struct AddonData {
  std::shared_ptr<Mailbox> mailbox;
  std::shared_ptr<ThreadGroup> threads;

  static AddonData& Of(Napi::Env env) { return *env.GetInstanceData<AddonData>(); }
};

}  // namespace holdfast
