// What every table of kernels has: look-up by name, counts of the calls of each row.
#pragma once
#include <atomic>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/types.h"

namespace fastdl {

// Throws Error naming the rows, as of the argument 'kernel' of `op`.
template <class Row>
const Row& row_named(const std::vector<Row>& table, const std::string& name, const char* op) {
  std::string names;
  for (const Row& row : table) {
    if (name == row.name) return row;
    names += names.empty() ? row.name : std::string(", ") + row.name;
  }
  fail(op, ": argument 'kernel': expected one of ", names, "; got '", name, "'");
}

// The row that a caller forces; null for "".
template <class Row>
const Row* forced_row(const std::vector<Row>& table, const std::string& name, const char* op) {
  return name.empty() ? nullptr : &row_named(table, name, op);
}

// A CPU row of the level amx multiplies tiles of 16 rows, of bfloat16 parts (gemm/cpu/kernel_amx.h).
template <class Row>
bool is_tiled(const Row& row) {
  return row.isa == Isa::kAmx;
}

// Calls that ran each row of a table since the last reset.
template <class Row>
class CallCounts {
 public:
  explicit CallCounts(const std::vector<Row>& table) : table_(table), counts_(table.size()) {}

  const std::vector<Row>& table() const { return table_; }
  void add(const Row& row) { counts_[index(row)].fetch_add(1, std::memory_order_relaxed); }
  i64 of(const Row& row) const { return counts_[index(row)].load(std::memory_order_relaxed); }
  void reset() {
    for (auto& n : counts_) n.store(0, std::memory_order_relaxed);
  }

 private:
  std::size_t index(const Row& row) const { return static_cast<std::size_t>(&row - table_.data()); }

  const std::vector<Row>& table_;
  std::vector<std::atomic<i64>> counts_;
};

}  // namespace fastdl
