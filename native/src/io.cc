#include "io.h"

namespace holdfast {

NbdOp* Io::AddPart(uint64_t offset) {
  if (used_ == parts_.size()) parts_.push_back(std::make_unique<Part>());
  Part* part = parts_[used_++].get();
  part->io = this;
  part->offset = offset;
  part->error = 0;
  open_++;
  return part;
}

void Io::PartDone(const Part& part) {
  if (part.error != 0 && !failure_) {
    failure_.emplace("NBD_REQUEST", op_, std::string(op_) + ": the server answered: " + ErrorText(part.error),
                     part.error, static_cast<double>(part.offset));
  }
  Release();
}

}  // namespace holdfast
