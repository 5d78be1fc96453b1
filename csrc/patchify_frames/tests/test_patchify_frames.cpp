// Unit tests of patchify_frames, run by ctest: tables, layout, normalisation, rounding, SIMD levels, CUDA tiles.
#include <cmath>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "common/test_check.h"
#include "patchify_frames/patchify_frames_cpu.h"
#include "patchify_frames/tile_plan.h"

namespace bridge_stg {
namespace {

constexpr double kMean[3] = {0.48145466, 0.4578275, 0.40821073}, kStd[3] = {0.26862954, 0.26130258, 0.27577711};
constexpr double kZero[3] = {0, 0, 0}, kOne[3] = {1, 1, 1};

void test_resize_tables() {
  for (const Interpolation interpolation : {Interpolation::kBicubic, Interpolation::kBilinear}) {
    for (const auto& [in, out] : std::vector<std::pair<int64_t, int64_t>>{
             {1, 1}, {1, 28}, {2, 28}, {720, 560}, {1280, 1008}, {97, 98}, {1080, 28}, {5000, 16}, {3, 1000}}) {
      const ResizeTable table = make_resize_table(in, out, interpolation);
      CHECK(table.precision >= 1 && table.precision <= 22);
      int32_t largest = 0;
      for (int64_t i = 0; i < out; ++i) {
        CHECK(table.start[i] >= 0 && table.count[i] >= 1 && table.start[i] + table.count[i] <= in);
        CHECK(i == 0 || table.start[i] >= table.start[i - 1]);
        int64_t sum = 0;
        for (int64_t j = 0; j < table.taps; ++j) {
          const int16_t weight = table.weights[i * table.taps + j];
          CHECK(j < table.count[i] || weight == 0);
          sum += weight;
          largest = std::max<int32_t>(largest, weight);
        }
        // Each weight is off by at most half a unit of the fixed point.
        CHECK(std::llabs(sum - (int64_t{1} << table.precision)) <= (table.count[i] + 1) / 2);
      }
      // The precision is the largest that fits: one bit more would overflow.
      CHECK(table.precision == 22 || 2 * largest + 1 >= 32767);
    }
  }
  // A triangle over two pixels: 1/4 3/4, then 3/4 1/4.
  const ResizeTable doubled = make_resize_table(2, 4, Interpolation::kBilinear);
  CHECK(doubled.start[1] == 0 && doubled.weights[doubled.taps] == 3 * doubled.weights[doubled.taps + 1]);
}

void test_index_map() {
  for (const PatchLayout layout : {PatchLayout{14, 2, 2}, PatchLayout{4, 3, 1}, PatchLayout{2, 1, 3}}) {
    const int64_t gt = 3, gh = 2 * layout.merge, gw = 4 * layout.merge, m = layout.merge;
    std::set<int64_t> seen;
    for (int64_t t = 0; t < gt; ++t) {
      for (int64_t gy = 0; gy < gh; ++gy) {
        for (int64_t gx = 0; gx < gw; ++gx) {
          const int64_t row = layout.row(t, gy, gx, gh, gw);
          const int64_t hb = gy / m, mh = gy % m, wb = gx / m, mw = gx % m;
          CHECK(row == (((t * (gh / m) + hb) * (gw / m) + wb) * m + mh) * m + mw);
          seen.insert(row);
        }
      }
    }
    CHECK(static_cast<int64_t>(seen.size()) == gt * gh * gw && *seen.rbegin() == gt * gh * gw - 1);
  }
  const PatchLayout layout{14, 2, 2};
  CHECK(layout.frame(0, 1, 3) == 1 && layout.frame(1, 0, 3) == 2 && layout.frame(1, 1, 3) == 2);
}

void test_normalization() {
  for (const double* mean : {kMean, kOne}) {
    const Normalization table = make_normalization(mean, kStd, 1.0 / 255, ElementType::kFloat32);
    CHECK(table.reciprocal_is_exact);
    CHECK(table.channel[1].value[200] ==
          (200.0f - static_cast<float>(mean[1]) * 255.0f) / (static_cast<float>(kStd[1]) * 255.0f));
  }
  const double tiny[3] = {1e-44, 1, 1};
  CHECK(!make_normalization(kMean, tiny, 1.0 / 255, ElementType::kFloat32).reciprocal_is_exact);
}

float half_value(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                        : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

float bfloat_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Every finite value is kept, the middle of two neighbours goes to the even one, and a hair off it to the nearer.
void test_rounding(uint16_t (*cast)(float), float (*value)(uint16_t), int largest) {
  for (int bits = 0; bits < largest; ++bits) {
    const float low = value(static_cast<uint16_t>(bits)), high = value(static_cast<uint16_t>(bits + 1));
    const float middle = low + (high - low) / 2;
    CHECK(cast(low) == bits && cast(-low) == (bits | 0x8000));
    if (middle == low || middle == high) continue;  // float32 holds no middle of the smallest bfloat16
    CHECK(cast(middle) == (bits % 2 == 0 ? bits : bits + 1));
    CHECK(cast(std::nextafterf(middle, low)) == bits && cast(std::nextafterf(middle, high)) == bits + 1);
  }
  CHECK(cast(INFINITY) == largest + 1 && cast(-INFINITY) == ((largest + 1) | 0x8000));
  CHECK(cast(NAN) != cast(INFINITY) && (cast(NAN) & (largest + 1)) == largest + 1);
}

struct Clip {
  VideoView view;
  std::vector<uint8_t> pixels;
  std::vector<int64_t> index;
};

Clip make_clip(std::mt19937& random, int64_t height, int64_t width, int64_t out_height, int64_t out_width,
               bool interleaved) {
  Clip clip;
  clip.view.frames = 3;
  clip.pixels.resize(clip.view.frames * 3 * height * width);
  for (uint8_t& pixel : clip.pixels) pixel = static_cast<uint8_t>(random() % 5 == 0 ? 255 : random());
  clip.index = {2, 0, 0, 1, 2};
  clip.view.pixels = clip.pixels.data();
  clip.view.frame_index = clip.index.data();
  clip.view.count = static_cast<int64_t>(clip.index.size());
  clip.view.height = height;
  clip.view.width = width;
  clip.view.frame_stride = 3 * height * width;
  clip.view.channel_stride = interleaved ? 1 : height * width;
  clip.view.pixel_stride = interleaved ? 3 : 1;
  clip.view.row_stride = interleaved ? 3 * width : width;
  clip.view.out_height = out_height;
  clip.view.out_width = out_width;
  return clip;
}

std::vector<uint8_t> patchify(const std::vector<VideoView>& views, const PatchLayout& layout,
                              Interpolation interpolation, const Normalization& normalization, SimdLevel level,
                              int64_t pieces) {
  const FramePatcher patcher(views, layout, interpolation, normalization, level);
  std::vector<uint8_t> out(patcher.rows() * patcher.columns() * element_size(normalization.type), 0xa5);
  for (int64_t piece = pieces - 1; piece >= 0; --piece) {
    patcher.run(patcher.units() * piece / pieces, patcher.units() * (piece + 1) / pieces, out.data());
  }
  return out;
}

// Height, width, height and width after the resize, for patches of 14 and 16 alike.
const int64_t kShapes[][4] = {{40, 50, 112, 224}, {224, 300, 112, 224}, {300, 224, 112, 224}, {112, 224, 112, 224},
                              {1, 1, 112, 112},   {20, 1200, 112, 112}, {9, 4000, 112, 112},  {2500, 7, 112, 112}};

void test_simd_levels() {
  std::mt19937 random(1);
  for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat16}) {
    for (const Interpolation interpolation : {Interpolation::kBicubic, Interpolation::kBilinear}) {
      const Normalization normalization = make_normalization(kMean, kStd, 1.0 / 255, type);
      for (const auto& shape : kShapes) {
        for (const bool interleaved : {false, true}) {
          const Clip clip = make_clip(random, shape[0], shape[1], shape[2], shape[3], interleaved);
          const PatchLayout layout{interleaved ? 16 : 14, 2, 1};
          const std::vector<uint8_t> plain =
              patchify({clip.view}, layout, interpolation, normalization, SimdLevel::kScalar, 1);
          for (const SimdLevel level : simd_levels()) {
            CHECK(plain ==
                  patchify({clip.view}, layout, interpolation, normalization, level, static_cast<int64_t>(level) + 1));
          }
        }
      }
    }
  }
}

// Weights of all output pixels along an axis, in double.
std::vector<std::vector<double>> exact_weights(int64_t in, int64_t out, bool bicubic) {
  const double scale = static_cast<double>(in) / out, stretch = std::max(scale, 1.0);
  const double support = (bicubic ? 2.0 : 1.0) * stretch;
  std::vector<std::vector<double>> weights(out, std::vector<double>(in, 0.0));
  for (int64_t i = 0; i < out; ++i) {
    double total = 0;
    for (int64_t j = 0; j < in; ++j) {
      const double center = scale * (i + 0.5), x = std::abs(j + 0.5 - center) / stretch;
      if (j < static_cast<int64_t>(center - support + 0.5) || j >= static_cast<int64_t>(center + support + 0.5))
        continue;
      if (!bicubic)
        weights[i][j] = std::max(1 - x, 0.0);
      else if (x < 1)
        weights[i][j] = (1.5 * x - 2.5) * x * x + 1;
      else if (x < 2)
        weights[i][j] = ((-0.5 * x + 2.5) * x - 4) * x + 2;
      total += weights[i][j];
    }
    for (double& weight : weights[i]) weight /= total;
  }
  return weights;
}

// One plane of a frame after the resize, in double, before rounding: [out_height, out_width].
std::vector<double> exact_plane(const VideoView& view, int64_t frame, int64_t channel, bool bicubic) {
  const auto across = exact_weights(view.width, view.out_width, bicubic);
  const auto down = exact_weights(view.height, view.out_height, bicubic);
  std::vector<double> rows(view.height * view.out_width, 0.0), plane(view.out_height * view.out_width, 0.0);
  const uint8_t* pixels = view.pixels + frame * view.frame_stride + channel * view.channel_stride;
  for (int64_t y = 0; y < view.height; ++y) {
    for (int64_t x = 0; x < view.out_width; ++x) {
      for (int64_t j = 0; j < view.width; ++j) {
        if (across[x][j] != 0) {
          rows[y * view.out_width + x] += across[x][j] * pixels[y * view.row_stride + j * view.pixel_stride];
        }
      }
    }
  }
  for (int64_t y = 0; y < view.out_height; ++y) {
    for (int64_t j = 0; j < view.height; ++j) {
      if (down[y][j] == 0) continue;
      for (int64_t x = 0; x < view.out_width; ++x) {
        plane[y * view.out_width + x] += down[y][j] * rows[j * view.out_width + x];
      }
    }
  }
  return plane;
}

// The CUDA kernel's tiles, one thread after another, against the definition in double.
void test_tiles() {
  std::mt19937 random(2);
  const TileNormalization tile_normalization{{0, 0, 0}, {1, 1, 1}, {1, 1, 1}, true};
  int64_t values = 0, different = 0, chunked = 0;
  for (const auto& shape : kShapes) {
    for (const PatchLayout layout : {PatchLayout{14, 2, 2}, PatchLayout{16, 3, 1}, PatchLayout{7, 1, 4}}) {
      const bool bicubic = layout.patch != 7;
      if (shape[2] % (layout.patch * layout.merge) || shape[3] % (layout.patch * layout.merge)) continue;
      const Clip clip = make_clip(random, shape[0], shape[1], shape[2], shape[3], layout.patch == 16);
      TileVideo video = tile_video(clip.view);
      CHECK(plan_tile(video, layout, bicubic));
      CHECK(tile_bytes(video, layout) <= kTileMostBytes);
      chunked += video.chunked;
      const int64_t gh = shape[2] / layout.patch, gw = shape[3] / layout.patch;
      const int64_t groups = (clip.view.count + layout.temporal - 1) / layout.temporal;
      std::vector<float> out(groups * gh * gw * layout.columns(), -1.0f), shared(tile_bytes(video, layout) / 4);
      const auto store = [&](int64_t position, float value) { out[position] = value; };
      for (int64_t tile = 0; tile < tile_count(video, layout); ++tile) {
        const auto run = [&](auto patch) {
          patchify_tile<decltype(patch)::value>(video, layout, tile_normalization, bicubic, tile, shared.data(), 0, 1,
                                                store, [] {});
        };
        if (layout.patch == 14) {
          run(std::integral_constant<int, 14>());
        } else if (layout.patch == 16) {
          run(std::integral_constant<int, 16>());
        } else {
          run(std::integral_constant<int, 0>());
        }
      }
      std::vector<std::vector<double>> planes;
      for (int64_t plane = 0; plane < 9; ++plane)
        planes.push_back(exact_plane(clip.view, plane / 3, plane % 3, bicubic));
      int64_t position = 0;
      std::vector<int64_t> place(groups * gh * gw);
      for (int64_t patch = 0; patch < groups * gh * gw; ++patch) {
        place[layout.row(patch / gw / gh, patch / gw % gh, patch % gw, gh, gw)] = patch;
      }
      for (const int64_t patch : place) {
        const int64_t t = patch / gw / gh, gy = patch / gw % gh, gx = patch % gw;
        for (int64_t c = 0; c < 3; ++c) {
          for (int64_t dt = 0; dt < layout.temporal; ++dt) {
            const int64_t frame = clip.index[layout.frame(t, dt, clip.view.count)];
            for (int64_t i = 0; i < layout.patch * layout.patch; ++i, ++position) {
              const int64_t y = gy * layout.patch + i / layout.patch, x = gx * layout.patch + i % layout.patch;
              const double exact = std::min(std::max(planes[3 * frame + c][y * shape[3] + x], 0.0), 255.0);
              CHECK(std::abs(out[position] - exact) <= 0.5 + 5e-3);
              different += out[position] != std::nearbyint(exact);
            }
          }
        }
      }
      values += position;
    }
  }
  CHECK(chunked > 0 && different * 1000 < values);
}

}  // namespace
}  // namespace bridge_stg

int main() {
  bridge_stg::test_resize_tables();
  bridge_stg::test_index_map();
  bridge_stg::test_normalization();
  bridge_stg::test_rounding(bridge_stg::to_float16, bridge_stg::half_value, 0x7bff);
  bridge_stg::test_rounding(bridge_stg::to_bfloat16, bridge_stg::bfloat_value, 0x7f7f);
  bridge_stg::test_simd_levels();
  bridge_stg::test_tiles();
  std::puts("patchify_frames: all hold");
}
