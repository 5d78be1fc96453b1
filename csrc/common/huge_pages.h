// Large fresh outputs on huge pages: filling one is otherwise mostly page faults.
#pragma once

#include <cstdint>

namespace bridge_stg {

// Asks the system to back memory that was just allocated, and not yet touched, by huge pages. Below 8 MiB, or where
// the system has none to offer, does nothing.
void advise_huge_pages(void* memory, int64_t bytes);

// Zeroed memory straight from the system, on huge pages, for `unmap_zeros` to give back; null below 32 MiB, where
// malloc may have memory at hand that it need not fetch, or where there is none to be had.
void* map_zeros(int64_t bytes);
void unmap_zeros(void* memory, int64_t bytes);

}  // namespace bridge_stg
