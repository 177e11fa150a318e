// FASTDL_LOG=1: one line on stderr for each decision, printed once.
#pragma once
#include <string>
#include <vector>

namespace fastdl {

bool log_enabled();
// not_taken: what was decided against, and why.
void log_once(std::string line, const std::vector<std::string>& not_taken = {});

}  // namespace fastdl
