// How all ops use threads. What a unit of work computes depends on shapes alone, so results do not depend on threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace bridge_stg {

// `count` threads at most. run(units, task) calls task(first, last) over ranges that make up 0..units-1, on any thread.
struct Workers {
  int64_t count;
  std::function<void(int64_t units, const std::function<void(int64_t, int64_t)>& task)> run;
};

// Calls work(item, worker) once for each item in 0..items-1, never on two threads at once with the same worker. A free
// worker takes the next item, so a thread that loses its core holds up nobody.
template <typename Work>
void for_each_item(const Workers& workers, int64_t items, const Work& work) {
  std::atomic<int64_t> next{0};
  workers.run(items < workers.count ? items : workers.count, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t item = next.fetch_add(1); item < items; item = next.fetch_add(1)) work(item, worker);
    }
  });
}

}  // namespace bridge_stg
