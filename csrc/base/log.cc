#include "base/log.h"

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <unordered_set>

namespace fastdl {

bool log_enabled() {
  static const bool on = [] {
    const char* env = std::getenv("FASTDL_LOG");
    return env && *env && !(env[0] == '0' && !env[1]);
  }();
  return on;
}

void log_once(std::string line, const std::vector<std::string>& not_taken) {
  for (const std::string& other : not_taken) line += "\n    not " + other;
  static auto* mutex = new std::mutex;
  static auto* seen = new std::unordered_set<std::string>;
  std::lock_guard<std::mutex> lock(*mutex);
  if (seen->insert(line).second) std::fprintf(stderr, "fastdl: %s\n", line.c_str());
}

}  // namespace fastdl
