#pragma once

#include <string>
#include <utility>

namespace holdfast {

// What went wrong, in the words of lib/types.ts. Thrown inside the addon, caught at the top of every
// thread, and handed to JavaScript as a plain object there.
struct Failure {
  std::string code;
  std::string op;
  std::string message;
  int error = 0;       // errno, 0 where there is none
  double offset = -1;  // disk offset, -1 where there is none

  Failure(std::string code_, std::string op_, std::string message_, int error_ = 0, double offset_ = -1)
      : code(std::move(code_)), op(std::move(op_)), message(std::move(message_)), error(error_), offset(offset_) {}
};

// strerror without its shared buffer.
std::string ErrorText(int error);

// FILE_IO with the errno and its text.
Failure FileFailure(const std::string& op, int error, double offset = -1);

Failure Cancelled(const std::string& op);

}  // namespace holdfast
