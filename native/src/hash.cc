#include "hash.h"

#include <xxhash.h>

#include <algorithm>

#include "failure.h"

namespace holdfast {

BlockHasher::BlockHasher(HashKind kind) : kind_(kind) {
  if (kind_ != HashKind::kSha256) return;
  context_.reset(EVP_MD_CTX_new());
  if (!context_) throw Failure("FILE_IO", "hash", "no memory for a hash", 12);
}

void BlockHasher::Hash(const uint8_t* data, size_t length, uint8_t* out) {
  if (kind_ == HashKind::kXxh3_128) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, length));
    std::copy(canonical.digest, canonical.digest + sizeof canonical.digest, out);
    return;
  }
  if (EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) != 1 ||
      EVP_DigestUpdate(context_.get(), data, length) != 1 || EVP_DigestFinal_ex(context_.get(), out, nullptr) != 1) {
    throw Failure("FILE_IO", "hash", "SHA-256 is not available in this OpenSSL");
  }
}

}  // namespace holdfast
