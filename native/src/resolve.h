#pragma once

#include <string>

#include "wake.h"

namespace holdfast {

// Looks a host name up in a thread of its own, because getaddrinfo(3) has no deadline. libnbd looks it
// up again; by then the answer is known to come. Throws Failure NBD_CONNECT or CANCELLED.
void ResolveHost(const std::string& host, Wake& wake, int64_t deadline_ms);

}  // namespace holdfast
