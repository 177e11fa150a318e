// FASTDL_LOG=1: one line on stderr for each decision, printed once.
#pragma once
#include <string>

namespace fastdl {

bool log_enabled();
void log_once(const std::string& line);

}  // namespace fastdl
