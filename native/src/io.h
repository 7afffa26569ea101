#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "failure.h"
#include "nbd-connection.h"

namespace holdfast {

// One transfer made of parts. The endpoint begins it, adds parts, and seals it; OnFinished runs when it
// is sealed and every part has been answered.
class Io {
 public:
  virtual ~Io() = default;
  virtual void OnFinished() = 0;

  void Begin(const char* op) {
    op_ = op;
    open_ = 1;
    used_ = 0;
    failure_.reset();
  }
  NbdOp* AddPart(uint64_t offset);
  void Seal() { Release(); }
  // The first error that the server answered.
  const std::optional<Failure>& failure() const { return failure_; }

 private:
  struct Part : NbdOp {
    Io* io = nullptr;
    uint64_t offset = 0;
    void OnDone() override { io->PartDone(*this); }
  };
  void PartDone(const Part& part);
  void Release() {
    if (--open_ == 0) OnFinished();
  }

  const char* op_ = "";
  size_t open_ = 0, used_ = 0;
  std::vector<std::unique_ptr<Part>> parts_;  // reused from transfer to transfer
  std::optional<Failure> failure_;
};

}  // namespace holdfast
