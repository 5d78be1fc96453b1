#include "common/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bridge_stg {

void advise_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kWorthwhile = int64_t{8} << 20;
  constexpr uintptr_t kPage = 4096;
  if (bytes < kWorthwhile) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // The result does not matter: where the system refuses the advice, ordinary pages do as well.
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void* map_zeros([[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr int64_t kBeyondMalloc = int64_t{32} << 20;  // glibc's malloc maps every larger block afresh
  if (bytes < kBeyondMalloc) return nullptr;
  void* memory = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  advise_huge_pages(memory, bytes);
  return memory;
#else
  return nullptr;
#endif
}

void unmap_zeros([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  (void)munmap(memory, static_cast<size_t>(bytes));
#endif
}

}  // namespace bridge_stg
