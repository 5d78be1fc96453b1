// Huge pages for large fresh outputs, because filling one is otherwise mostly page faults.
#pragma once

#include <cstdint>

namespace bridge_stg {

// Asks the system to back freshly allocated, untouched memory by huge pages. Does nothing below 8 MiB, or where the
// system has no huge pages.
void advise_huge_pages(void* memory, int64_t bytes);

// Returns zeroed memory from the system, on huge pages, which `unmap_zeros` gives back; null below 32 MiB, where malloc
// may still hold memory of the process, or where the system gives none.
void* map_zeros(int64_t bytes);
void unmap_zeros(void* memory, int64_t bytes);

}  // namespace bridge_stg
