// Memory for intermediate results, and the arithmetic of its sizes.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace bridge_stg {

constexpr int64_t kCacheLine = 64;

inline int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

inline int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

// `count` floats without values.
inline std::unique_ptr<float[]> new_floats(int64_t count) {
  return std::unique_ptr<float[]>(new float[static_cast<size_t>(count)]);
}

// Zeroed bytes on a cache-line boundary.
class AlignedBytes {
 public:
  AlignedBytes() = default;

  explicit AlignedBytes(int64_t size) : bytes_(allocate(round_up(size + 1, kCacheLine))) {}

  uint8_t* data() const { return bytes_.get(); }

 private:
  struct Free {
    void operator()(uint8_t* bytes) const { std::free(bytes); }
  };

  static uint8_t* allocate(int64_t size) {
    void* bytes = std::aligned_alloc(kCacheLine, static_cast<size_t>(size));
    if (bytes == nullptr) throw std::bad_alloc();
    return static_cast<uint8_t*>(std::memset(bytes, 0, static_cast<size_t>(size)));
  }

  std::unique_ptr<uint8_t, Free> bytes_;
};

}  // namespace bridge_stg
