#include "failure.h"

#include <system_error>

namespace holdfast {

std::string ErrorText(int error) { return std::generic_category().message(error); }

Failure FileFailure(const std::string& op, int error, double offset) {
  return Failure("FILE_IO", op, op + ": " + ErrorText(error), error, offset);
}

Failure Cancelled(const std::string& op) { return Failure("CANCELLED", op, "cancelled"); }

}  // namespace holdfast
