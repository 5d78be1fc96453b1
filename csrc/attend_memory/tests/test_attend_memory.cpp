// Unit tests of attend_memory, run by ctest: products, exponentials, attention against plain loops in double, at every
// SIMD level.
#include "attend_memory/attend_memory_cpu.h"

#include <cmath>
#include <random>
#include <vector>

#include "attend_memory/head_products.h"
#include "common/test_check.h"

namespace bridge_stg {
namespace {

using Floats = std::vector<float>;

const Workers kThreads = thread_workers(3);

Floats draw(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  return values;
}

bool near(double found, double wanted) { return std::fabs(found - wanted) <= 2e-5 * (1.0 + std::fabs(wanted)); }

void test_product(const AttendKernels& kernels) {
  for (const int64_t rows : {1, 5, 12, 13, 37}) {
    for (const int64_t columns : {1, 15, 16, 33, 70, 128}) {
      for (const int64_t steps : {0, 1, 7, 300}) {
        const Floats a = draw(rows * steps + 1, 1), b = draw(steps * columns + 1, 2), keep = draw(rows, 3);
        const Floats before = draw(rows * columns, 4);
        for (const int mode : {0, 1, 2, 3}) {  // over, added, scaled and added, a by columns
          Floats c = before;
          const bool across = mode == 3;
          kernels.product({rows, columns, steps, a.data(), across ? 1 : steps, across ? rows : 1, b.data(), columns,
                           c.data(), columns, mode == 1 || mode == 2, mode == 2 ? keep.data() : nullptr});
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) {
              const size_t at = static_cast<size_t>(i * columns + j);
              double sum = mode == 1 ? before[at] : mode == 2 ? double{keep[static_cast<size_t>(i)]} * before[at] : 0.0;
              for (int64_t k = 0; k < steps; ++k) {
                sum += double{a[static_cast<size_t>(across ? k * rows + i : i * steps + k)]} *
                       b[static_cast<size_t>(k * columns + j)];
              }
              CHECK(near(c[at], sum));
            }
          }
        }
      }
    }
  }
}

void test_transpose(const AttendKernels& kernels) {
  for (const int64_t rows : {1, 16, 21}) {
    for (const int64_t width : {1, 16, 35}) {
      const int64_t stride = round_up(rows, kColumns) + kColumns;
      const Floats from = draw(rows * width, 5);
      Floats to(static_cast<size_t>(width * stride), 7.0f);
      kernels.transpose(from.data(), width, rows, width, 0.5f, to.data(), stride);
      for (int64_t c = 0; c < width; ++c) {
        for (int64_t r = 0; r < stride; ++r) {
          const float found = to[static_cast<size_t>(c * stride + r)];
          CHECK(found == (r < rows ? 0.5f * from[static_cast<size_t>(r * width + c)]
                                   : (r < round_up(rows, kColumns) ? 0.0f : 7.0f)));
        }
      }
    }
  }
}

struct Wanted {
  std::vector<double> out, lse, d_query, d_memory;
};

// One clip, by plain loops; the loss is the sum of out and of lse.
Wanted plain(const Floats& query, const Floats& memory, const Floats& bias, int64_t rows, int64_t keys, int64_t width,
             double scale) {
  Wanted wanted;
  wanted.out.resize(query.size());
  wanted.d_query.resize(query.size());
  wanted.d_memory.resize(memory.size());
  const auto q = [&](int64_t r, int64_t c) { return double{query[static_cast<size_t>(r * width + c)]}; };
  const auto x = [&](int64_t k, int64_t c) { return double{memory[static_cast<size_t>(k * width + c)]}; };
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<double> p, gradient;
    double total = 0.0, mean = 0.0;
    for (int64_t k = 0; k < keys; ++k) {
      double score = bias[static_cast<size_t>(k)], sum = 0.0;
      for (int64_t c = 0; c < width; ++c) {
        score += scale * q(r, c) * x(k, c);
        sum += x(k, c);
      }
      p.push_back(std::exp(score));
      gradient.push_back(sum);
      total += p.back();
    }
    wanted.lse.push_back(std::log(total));
    for (int64_t k = 0; k < keys; ++k) {
      p[static_cast<size_t>(k)] /= total;
      mean += p[static_cast<size_t>(k)] * gradient[static_cast<size_t>(k)];
    }
    for (int64_t k = 0; k < keys; ++k) {
      const double probability = p[static_cast<size_t>(k)];
      const double d_score = probability * (gradient[static_cast<size_t>(k)] - mean + 1.0);
      for (int64_t c = 0; c < width; ++c) {
        wanted.out[static_cast<size_t>(r * width + c)] += probability * x(k, c);
        wanted.d_query[static_cast<size_t>(r * width + c)] += scale * d_score * x(k, c);
        wanted.d_memory[static_cast<size_t>(k * width + c)] += probability + scale * d_score * q(r, c);
      }
    }
  }
  return wanted;
}

void test_attention(const AttendKernels& kernels, int64_t rows, int64_t keys, int64_t width) {
  const Floats query = draw(rows * width, 10), memory = draw(keys * width, 11), bias = draw(keys, 12);
  const float scale = 1.0f / std::sqrt(static_cast<float>(width));
  const Wanted wanted = plain(query, memory, bias, rows, keys, width, scale);
  const Memory view{ElementType::kFloat32, 1,      keys, width, {memory.data(), keys * width, width}, {},
                    bias.data(),           nullptr};
  const auto size = [](int64_t count) { return static_cast<size_t>(count); };
  Floats out(size(rows * width), NAN), lse(size(rows), NAN), mass(size(keys), NAN);
  Floats stash(size(keys * stash_columns(rows)), NAN), d_score(stash.size(), NAN), d_query(out.size(), NAN);
  Floats d_bias(size(keys), NAN), d_memory(memory.size(), NAN), d_position(memory.size(), NAN);
  const Attention attention(view, rows, kernels, kThreads);
  attention.forward({rows, scale, query.data(), out.data(), lse.data(), mass.data(), stash.data()});
  const Floats ones(size(rows * width), 1.0f);
  attention.backward({rows, scale, query.data(), lse.data(), stash.data(), true, ones.data(), ones.data(),
                      d_score.data(), d_query.data(), d_bias.data()});
  memory_gradient(view, {{rows, query.data(), ones.data(), stash.data(), d_score.data()}},
                  {d_memory.data(), d_position.data()}, kernels, kThreads);
  double all = 0.0;
  for (const float value : mass) all += value;
  CHECK(near(all, static_cast<double>(rows)));
  for (size_t i = 0; i < lse.size(); ++i) CHECK(near(lse[i], wanted.lse[i]));
  for (size_t i = 0; i < out.size(); ++i) {
    CHECK(near(out[i], wanted.out[i]));
    CHECK(std::fabs(d_query[i] - wanted.d_query[i]) <= 1e-3);
  }
  for (size_t i = 0; i < d_memory.size(); ++i) {
    CHECK(std::fabs(d_memory[i] - wanted.d_memory[i]) <= 1e-3);
    CHECK(std::isfinite(d_position[i]));
  }
  // Without a stash to write to, the same.
  Floats again(out.size(), NAN);
  attention.forward({rows, scale, query.data(), again.data(), lse.data(), nullptr, nullptr});
  for (size_t i = 0; i < out.size(); ++i) CHECK(near(again[i], out[i]));
}

void test_head_products(const AttendKernels& kernels) {
  const HeadShape shape{70, 3, 20, 150};
  const int64_t narrow_row = shape.heads * shape.head_dim;
  const Floats narrow = draw(shape.count * narrow_row, 20), weight = draw(narrow_row * shape.width, 21);
  Floats wide(static_cast<size_t>(shape.count * shape.heads * shape.width), NAN), back(narrow.size(), NAN);
  Floats product(weight.size(), NAN);
  expand_heads(shape, narrow.data(), weight.data(), wide.data(), kernels, kThreads);
  contract_heads(shape, wide.data(), weight.data(), back.data(), kernels, kThreads);
  correlate_heads(shape, narrow.data(), wide.data(), product.data(), kernels, kThreads);
  // <expand(x), expand(x)> = <x, contract(expand(x))> = <weight, correlate(x, expand(x))>.
  double squares = 0.0, through_back = 0.0, through_weight = 0.0;
  for (const float value : wide) squares += double{value} * value;
  for (size_t i = 0; i < narrow.size(); ++i) through_back += double{narrow[i]} * back[i];
  for (size_t i = 0; i < weight.size(); ++i) through_weight += double{weight[i]} * product[i];
  CHECK(std::fabs(through_back / squares - 1.0) < 1e-5);
  CHECK(std::fabs(through_weight / squares - 1.0) < 1e-5);
  double sum = 0.0;  // of one element
  for (int64_t d = 0; d < shape.head_dim; ++d) {
    sum += double{narrow[static_cast<size_t>(5 * narrow_row + 2 * shape.head_dim + d)]} *
           weight[static_cast<size_t>((2 * shape.head_dim + d) * shape.width + 149)];
  }
  CHECK(near(wide[static_cast<size_t>((5 * shape.heads + 2) * shape.width + 149)], sum));
}

}  // namespace
}  // namespace bridge_stg

int main() {
  for (const bridge_stg::SimdLevel level : bridge_stg::simd_levels()) {
    const bridge_stg::AttendKernels& kernels = bridge_stg::kernels_of<bridge_stg::AttendKernels>(level);
    bridge_stg::test_product(kernels);
    bridge_stg::test_transpose(kernels);
    bridge_stg::test_attention(kernels, 3, 5, 7);
    bridge_stg::test_attention(kernels, 33, 200, 70);
    bridge_stg::test_attention(kernels, 20, 2100, 24);
    bridge_stg::test_attention(kernels, 90, 40, 1024);
    bridge_stg::test_head_products(kernels);
  }
  std::puts("attend_memory: all hold");
}
