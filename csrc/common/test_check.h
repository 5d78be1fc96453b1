// What the C++ unit tests share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "common/cpu_features.h"
#include "common/parallel.h"

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (false)

namespace bridge_stg {

// The SIMD levels that this processor can run.
inline std::vector<SimdLevel> simd_levels() {
  std::vector<SimdLevel> usable;
  for (const SimdLevel level : {SimdLevel::kScalar, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (level <= simd_level()) usable.push_back(level);
  }
  return usable;
}

inline Workers thread_workers(int64_t count) {
  return {count, [](int64_t units, const std::function<void(int64_t, int64_t)>& task) {
            std::vector<std::thread> threads;
            for (int64_t unit = 0; unit < units; ++unit) threads.emplace_back(task, unit, unit + 1);
            for (std::thread& thread : threads) thread.join();
          }};
}

}  // namespace bridge_stg
