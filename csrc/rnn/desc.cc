#include "base/check.h"
#include "rnn/rnn.h"

namespace fastdl {

const char* rnn_cell_name(RnnCell cell) {
  constexpr const char* kNames[] = {"lstm", "gru", "rnn"};
  return kNames[static_cast<int>(cell)];
}

std::string describe(const RnnDesc& d) {
  return concat(rnn_cell_name(d.cell), d.backward ? " backward " : " ", dtype_name(d.dtype, d.precision), " T=", d.T,
                " B=", d.B, " H=", d.H, d.projected ? concat(" P=", d.P) : std::string());
}

}  // namespace fastdl
