// Items of work for a few threads: whoever is free takes the next, so that one that loses its core holds up nobody.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace bridge_stg {

// Threads to work on, `count` of them at the most; run(units, task) calls task(first, last) over parts of 0..units-1.
struct Workers {
  int64_t count;
  std::function<void(int64_t units, const std::function<void(int64_t, int64_t)>& task)> run;
};

// Calls work(item, worker) once for every item in 0..items-1, on no two threads at once with the same worker.
template <typename Work>
void for_each_item(const Workers& workers, int64_t items, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t hands = items < workers.count ? items : workers.count;
  workers.run(hands, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) work(item, worker);
    }
  });
}

}  // namespace bridge_stg
