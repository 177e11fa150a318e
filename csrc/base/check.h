// Errors that reach Python: `Error` becomes RuntimeError, `TypeMismatch` becomes TypeError.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace fastdl {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct TypeMismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream s;
  (s << ... << parts);
  return s.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(concat(parts...));
}

}  // namespace fastdl
