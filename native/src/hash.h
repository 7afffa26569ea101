#pragma once

#include <openssl/evp.h>

#include <cstddef>
#include <cstdint>
#include <memory>

namespace holdfast {

enum class HashKind { kXxh3_128, kSha256 };

constexpr size_t kMaxHashBytes = 32;
constexpr size_t HashBytes(HashKind kind) { return kind == HashKind::kSha256 ? 32 : 16; }

// Hashes blocks, one after the other. Belongs to one thread.
class BlockHasher {
 public:
  explicit BlockHasher(HashKind kind);

  size_t bytes() const { return HashBytes(kind_); }
  // Writes bytes() bytes: XXH3-128 in canonical (big-endian) form with seed 0, or SHA-256.
  void Hash(const uint8_t* data, size_t length, uint8_t* out);

 private:
  struct Free {
    void operator()(EVP_MD_CTX* it) const { EVP_MD_CTX_free(it); }
  };
  HashKind kind_;
  std::unique_ptr<EVP_MD_CTX, Free> context_;
};

}  // namespace holdfast
