#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "copy-endpoints.h"

namespace holdfast {

namespace {

// libnbd refuses larger ones, and so do most servers.
constexpr uint64_t kLargestRequest = 32u << 20;
constexpr int kSendBufferBytes = 1 << 20;

uint64_t LargestRequest(const ExportFacts& facts) {
  const uint64_t most = facts.maximum_block == 0 ? kLargestRequest : std::min(facts.maximum_block, kLargestRequest);
  const uint64_t block = std::max<uint64_t>(facts.minimum_block, 1);
  return std::max(most - most % block, block);
}

void CheckExport(const char* role, const ExportFacts& facts, const DiskShape& shape) {
  if (facts.size < shape.disk_bytes) {
    throw Failure("NBD_REQUEST", "open",
                  std::string("the ") + role + " offers " + std::to_string(facts.size) + " bytes, fewer than the " +
                      std::to_string(shape.disk_bytes) + " of the disk",
                  ENOSPC);
  }
  if (facts.minimum_block > kBlockSlack) {
    throw Failure("NBD_REQUEST", "open", std::string("the ") + role + " wants blocks of more than 64 KiB", EINVAL);
  }
}

}  // namespace

RequestBuffer::RequestBuffer(size_t request_bytes) {
  const size_t bytes = request_bytes + 2 * kBlockSlack;
  memory.reset(static_cast<uint8_t*>(std::aligned_alloc(65536, (bytes + 65535) / 65536 * 65536)));
  if (!memory) throw std::bad_alloc();
}

void RequestBuffer::Free::operator()(uint8_t* it) const { std::free(it); }

NbdSource::NbdSource(std::unique_ptr<NbdConnection> connection, const DiskShape& shape)
    : connection_(std::move(connection)),
      block_(std::max<uint64_t>(connection_->facts().minimum_block, 1)),
      most_(LargestRequest(connection_->facts())) {
  CheckExport("source", connection_->facts(), shape);
}

void NbdSource::Read(const Task& task, RequestBuffer& buffer, Io& io) {
  io.Begin("pread");
  const uint64_t before = task.offset % block_;
  const uint64_t start = task.offset - before;
  const uint64_t end = std::min(connection_->facts().size, (task.offset + task.length + block_ - 1) / block_ * block_);
  uint8_t* into = buffer.data() - before;
  for (uint64_t at = start; at < end; at += most_) {
    connection_->Read(into + (at - start), std::min(most_, end - at), at, io.AddPart(at));
  }
  io.Seal();
}

NbdSink::NbdSink(std::unique_ptr<NbdConnection> connection, const DiskShape& shape)
    : connection_(std::move(connection)),
      shape_(shape),
      block_(std::max<uint64_t>(connection_->facts().minimum_block, 1)),
      most_(LargestRequest(connection_->facts())) {
  const ExportFacts& facts = connection_->facts();
  CheckExport("sink", facts, shape);
  if (facts.is_read_only) throw Failure("NBD_REQUEST", "open", "the sink is read-only", EROFS);
  if (shape.cluster_bytes % block_ != 0) {
    throw Failure("NBD_REQUEST", "open", "the sink wants larger blocks than the clusters written", EINVAL);
  }
  connection_->GrowSendBuffer(kSendBufferBytes);
  if (!facts.can_zero) zeroes_.resize(std::min<uint64_t>(most_, shape.request_bytes) + kBlockSlack);
}

// The end of the disk may lie inside a block of the sink; the rest of that block is written as zeroes.
uint64_t NbdSink::PaddedLength(uint64_t length, uint64_t offset) const {
  if (offset + length != shape_.disk_bytes) return length;
  return std::min(connection_->facts().size - offset, (length + block_ - 1) / block_ * block_);
}

void NbdSink::Write(uint8_t* data, uint64_t length, uint64_t offset, Io& io) {
  const uint64_t padded = PaddedLength(length, offset);
  std::memset(data + length, 0, padded - length);
  for (uint64_t at = 0; at < padded; at += most_) {
    connection_->Write(data + at, std::min(most_, padded - at), offset + at, 0, io.AddPart(offset + at));
  }
}

void NbdSink::Zero(uint64_t length, uint64_t offset, Io& io) {
  const uint64_t padded = PaddedLength(length, offset);
  if (connection_->facts().can_zero) {
    connection_->Zero(padded, offset, 0, io.AddPart(offset));
    return;
  }
  const uint64_t step = std::min<uint64_t>(most_, shape_.request_bytes);
  for (uint64_t at = 0; at < padded; at += step) {
    connection_->Write(zeroes_.data(), std::min(step, padded - at), offset + at, 0, io.AddPart(offset + at));
  }
}

void NbdSink::Flush(Io& io) {
  if (connection_->facts().can_flush) connection_->Flush(io.AddPart(0));
}

}  // namespace holdfast
