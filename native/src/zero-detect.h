#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace holdfast {

// True when every byte is zero; every byte is read. Data usually shows itself in the first bytes; the
// rest is a comparison of the block with itself, which libc does with the widest registers there are.
inline bool IsZero(const uint8_t* data, size_t length) {
  constexpr size_t kHead = 16;
  const size_t head = std::min(kHead, length);
  for (size_t i = 0; i < head; i++)
    if (data[i] != 0) return false;
  return length <= kHead || std::memcmp(data, data + kHead, length - kHead) == 0;
}

}  // namespace holdfast
