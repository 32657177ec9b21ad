// What both programs of the self-test count and print.
#pragma once

#include <cstdio>
#include <string>

namespace peft_kernels::selftest {

inline int failed = 0, ran = 0;

// An empty complaint is none.
inline void report(const std::string& what, const std::string& complaint) {
  ++ran;
  if (complaint.empty()) return;
  ++failed;
  std::printf("%s: %s\n", what.c_str(), complaint.c_str());
}

// The program's exit status.
inline int finish() {
  std::printf("%d of %d passed\n", ran - failed, ran);
  return failed != 0;
}

}  // namespace peft_kernels::selftest
