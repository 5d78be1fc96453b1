// Unit tests of prune_tokens, run by ctest: selection, scores and gradients in double, SIMD levels, threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "common/test_check.h"
#include "prune_tokens/prune_tokens_cpu.h"
#include "prune_tokens/select.h"

namespace bridge_stg {
namespace {

void test_selection() {
  std::mt19937 random(0);
  const float special[] = {0.0f,  -0.0f, 1.0f, -1.0f, NAN, INFINITY, -INFINITY, std::numeric_limits<float>::max(),
                           1e-40f};
  CHECK(order_key(0.0f) == order_key(-0.0f) && order_key(-INFINITY) > kNanKey && kNanKey > kMaskedKey);
  CHECK(order_key(1e-40f) > order_key(0.0f) && order_key(-1.0f) > order_key(-2.0f));
  CHECK(order_key(INFINITY) > order_key(std::numeric_limits<float>::max()));
  for (int trial = 0; trial < 3000; ++trial) {
    const int64_t count = 1 + random() % 90, keep = 1 + random() % count;
    std::vector<int32_t> keys(count);
    for (int32_t& key : keys) {
      const uint32_t kind = random();
      key = kind % 11 == 0 ? kMaskedKey : order_key(special[random() % (trial % 9 + 1)]);
      if (trial % 4 == 0) key = static_cast<int32_t>(random());
      if (trial % 7 == 0 && kind % 5 == 0) key = INT32_MAX;
    }
    std::vector<int64_t> order(count), expected;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
    expected.assign(order.begin(), order.begin() + keep);
    std::sort(expected.begin(), expected.end());
    for (const SimdLevel level : simd_levels()) {
      std::vector<int64_t> found(keep);
      select_highest(keys.data(), count, keep, kernels_of<PruneKernels>(level).count_at_least, found.data());
      CHECK(found == expected);
    }
  }
}

void test_elements() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Float16 half{static_cast<uint16_t>(bits)};
    const BFloat16 brain{static_cast<uint16_t>(bits)};
    if ((bits & 0x7c00u) != 0x7c00u || (bits & 0x3ffu) == 0) CHECK(to_float16(to_float(half)) == bits);
    if ((bits & 0x7f80u) != 0x7f80u || (bits & 0x7fu) == 0) CHECK(to_bfloat16(to_float(brain)) == bits);
  }
  CHECK(std::isnan(to_float(Float16{0x7c01})) && to_float(Float16{0x0001}) == 0x1p-24f);
}

struct Sizes {
  int64_t segments, count, width, queries, keep;
};

template <typename T>
constexpr ElementType kTypeOf = ElementType::kFloat32;
template <>
constexpr ElementType kTypeOf<BFloat16> = ElementType::kBFloat16;
template <>
constexpr ElementType kTypeOf<Float16> = ElementType::kFloat16;

template <typename T>
std::vector<T> draw(std::mt19937& random, int64_t size) {
  std::normal_distribution<float> normal;
  std::vector<T> values(size);
  for (T& value : values) from_float(normal(random), &value);
  return values;
}

template <typename T>
struct Problem {
  Sizes sizes;
  Scoring scoring;
  float scale = 0.3f;
  std::vector<T> tokens, queries, grad_kept;
  std::vector<float> grad_score, grad_scores;

  Problem(std::mt19937& random, const Sizes& s, const Scoring& how)
      : sizes(s),
        scoring(how),
        tokens(draw<T>(random, s.segments * s.count * s.width)),
        queries(draw<T>(random, s.segments * s.queries * s.width)),
        grad_kept(draw<T>(random, s.segments * s.keep * s.width)),
        grad_score(draw<float>(random, s.segments * s.keep)),
        grad_scores(draw<float>(random, s.segments * s.count)) {}

  TokenRows rows(const std::vector<T>& data, int64_t count) const {
    return {kTypeOf<T>, data.data(), sizes.segments, count, sizes.width, count * sizes.width, sizes.width};
  }

  QueryView query() const {
    return {kTypeOf<T>, queries.data(), sizes.queries, sizes.queries * sizes.width, sizes.width, 1};
  }
};

template <typename T>
struct Results {
  std::vector<T> kept, d_tokens, d_queries;
  std::vector<int64_t> index;
  std::vector<float> score, scores;
};

template <typename T>
Results<T> solve(const Problem<T>& problem, bool all_scores, SimdLevel level, int64_t threads) {
  const Sizes& s = problem.sizes;
  Results<T> r;
  r.kept.resize(s.segments * s.keep * s.width);
  r.d_tokens.resize(problem.tokens.size());
  r.d_queries.resize(problem.queries.size());
  r.index.resize(s.segments * s.keep);
  r.score.resize(s.segments * s.keep);
  r.scores.resize(s.segments * s.count);
  const PruneKernels& kernels = kernels_of<PruneKernels>(level);
  prune_forward(problem.rows(problem.tokens, s.count), problem.query(),
                {problem.scoring, problem.scale, s.keep, nullptr, r.kept.data(), r.index.data(), r.score.data(),
                 all_scores ? r.scores.data() : nullptr},
                kernels, thread_workers(threads));
  const PruneBackward call{problem.scoring,
                           problem.scale,
                           false,
                           s.count,
                           s.keep,
                           r.index.data(),
                           all_scores ? r.scores.data() : r.score.data(),
                           problem.grad_score.data(),
                           all_scores ? problem.grad_scores.data() : nullptr,
                           problem.rows(problem.grad_kept, s.keep),
                           r.d_tokens.data(),
                           r.d_queries.data()};
  prune_backward(all_scores ? problem.rows(problem.tokens, s.count) : problem.rows(r.kept, s.keep), problem.query(),
                 call, kernels, thread_workers(threads));
  return r;
}

// The definition in double: scores, and the gradient of the sum of score times gradient.
template <typename T>
void check_against_double(const Problem<T>& problem, const Results<T>& found, bool all_scores, double tolerance) {
  const Sizes& s = problem.sizes;
  std::vector<double> d_tokens(problem.tokens.size()), d_queries(problem.queries.size());
  const auto close = [&](double a, double b) { return std::abs(a - b) <= tolerance * (1 + std::abs(b)); };
  for (int64_t row = 0; row < s.segments * s.count; ++row) {
    const int64_t segment = row / s.count;
    const T* x = problem.tokens.data() + row * s.width;
    const T* query = problem.queries.data() + segment * s.queries * s.width;
    const int64_t* picks = found.index.data() + segment * s.keep;
    const int64_t place = std::lower_bound(picks, picks + s.keep, row % s.count) - picks;
    const bool kept = place < s.keep && picks[place] == row % s.count;
    double square = 0;
    for (int64_t d = 0; d < s.width; ++d) square += double{to_float(x[d])} * to_float(x[d]);
    const double inverse = problem.scoring.cosine ? 1 / std::sqrt(square) : 1;
    std::vector<double> dots(s.queries), weight(s.queries, 0);
    for (int64_t q = 0; q < s.queries; ++q) {
      for (int64_t d = 0; d < s.width; ++d) dots[q] += double{to_float(x[d])} * to_float(query[q * s.width + d]);
      dots[q] *= problem.scale * inverse;
    }
    const int64_t top = std::max_element(dots.begin(), dots.end()) - dots.begin();
    double score = dots[top];
    if (problem.scoring.reduce == Reduce::kMax) {
      weight[top] = 1;
    } else if (problem.scoring.reduce == Reduce::kMean) {
      score = std::accumulate(dots.begin(), dots.end(), 0.0) / s.queries;
      weight.assign(s.queries, 1.0 / s.queries);
    } else {
      double total = 0;
      for (const double dot : dots) total += std::exp(dot - dots[top]);
      score = dots[top] + std::log(total);
      for (int64_t q = 0; q < s.queries; ++q) weight[q] = std::exp(dots[q] - score);
    }
    if (all_scores) CHECK(close(found.scores[row], score));
    if (kept) CHECK(close(found.score[segment * s.keep + place], score));
    double grad = all_scores ? problem.grad_scores[row] : 0;
    if (kept) grad += problem.grad_score[segment * s.keep + place];
    for (int64_t d = 0; d < s.width; ++d) {
      const double value = to_float(x[d]);
      double& d_x = d_tokens[row * s.width + d];
      if (kept) d_x = to_float(problem.grad_kept[(segment * s.keep + place) * s.width + d]);
      for (int64_t q = 0; q < s.queries; ++q) {
        const double q_d = to_float(query[q * s.width + d]), part = grad * weight[q];
        d_x += part * problem.scale * inverse * q_d;
        if (problem.scoring.cosine) d_x -= part * dots[q] * inverse * inverse * value;
        d_queries[(segment * s.queries + q) * s.width + d] += part * problem.scale * inverse * value;
      }
    }
    if (kept) {
      const T* copy = found.kept.data() + (segment * s.keep + place) * s.width;
      for (int64_t d = 0; d < s.width; ++d) CHECK(to_float(copy[d]) == to_float(x[d]));
    }
  }
  for (size_t i = 0; i < d_tokens.size(); ++i) CHECK(close(to_float(found.d_tokens[i]), d_tokens[i]));
  for (size_t i = 0; i < d_queries.size(); ++i) CHECK(close(to_float(found.d_queries[i]), d_queries[i]));
}

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](T x, T y) { return to_float(x) == to_float(y); });
}

template <typename T>
void test_problems(double tolerance) {
  std::mt19937 random(1);
  for (const Sizes& sizes : {Sizes{3, 17, 24, 4, 5}, Sizes{1, 1, 8, 1, 1}, Sizes{2, 131, 37, 9, 131},
                             Sizes{1, 700, 16, 3, 600}, Sizes{5, 67, 7, 2, 1}, Sizes{2, 20, 1000, 17, 7}}) {
    for (const bool cosine : {false, true}) {
      for (const Reduce reduce : {Reduce::kMax, Reduce::kMean, Reduce::kLogSumExp}) {
        const Problem<T> problem(random, sizes, {cosine, reduce});
        for (const bool all_scores : {false, true}) {
          for (const SimdLevel level : simd_levels()) {
            const Results<T> first = solve(problem, all_scores, level, 1);
            check_against_double(problem, first, all_scores, tolerance);
            for (const int64_t threads : {2, 5}) {
              const Results<T> again = solve(problem, all_scores, level, threads);
              CHECK(first.index == again.index && first.score == again.score && first.scores == again.scores);
              CHECK(same(first.d_tokens, again.d_tokens) && same(first.d_queries, again.d_queries));
            }
          }
        }
      }
    }
  }
}

// Cosine of rows times powers of two, whose squares over- and underflow: the same bits, and gradients of the rows
// divided by that power. Rows of zeros score 0 without a gradient, infinite ones NaN.
template <typename T>
void test_cosine_range() {
  std::mt19937 random(2);
  for (const Reduce reduce : {Reduce::kMax, Reduce::kMean, Reduce::kLogSumExp}) {
    Problem<T> problem(random, {2, 70, 37, 5, 70}, {true, reduce});
    for (T& value : problem.grad_kept) from_float(0.0f, &value);
    Problem<T> scaled = problem;
    const int exponents[] = {-100, -75, -40, 0, 45, 70, 90};
    const auto exponent = [&](int64_t row) { return exponents[row % 7]; };
    for (size_t i = 0; i < scaled.tokens.size(); ++i) {
      from_float(std::ldexp(to_float(scaled.tokens[i]), exponent(i / 37)), &scaled.tokens[i]);
    }
    for (const SimdLevel level : simd_levels()) {
      const Results<T> plain = solve(problem, true, level, 1), found = solve(scaled, true, level, 2);
      CHECK(plain.scores == found.scores && plain.index == found.index && same(plain.d_queries, found.d_queries));
      for (size_t i = 0; i < plain.d_tokens.size(); ++i) {
        CHECK(std::ldexp(to_float(plain.d_tokens[i]), -exponent(i / 37)) == to_float(found.d_tokens[i]));
      }
    }
    const float tiny = std::numeric_limits<float>::denorm_min();
    for (const float value : {0.0f, tiny, std::numeric_limits<float>::max(), INFINITY}) {
      std::fill(scaled.tokens.begin(), scaled.tokens.begin() + 37, T{});
      from_float(value, &scaled.tokens[0]);
      const float stored = to_float(scaled.tokens[0]), first = to_float(problem.queries[0]);
      if (reduce == Reduce::kMax && stored == value) scaled.queries.assign(scaled.queries.size(), problem.queries[0]);
      for (const SimdLevel level : simd_levels()) {
        const Results<T> found = solve(scaled, true, level, 1);
        const float score = found.scores[0];
        if (stored == INFINITY) CHECK(std::isnan(score));
        if (stored == 0.0f) CHECK(to_float(found.d_tokens[0]) == 0.0f);
        if (stored == 0.0f && reduce != Reduce::kLogSumExp) CHECK(score == 0.0f);
        if (reduce == Reduce::kMax && stored == value && value > 0.0f && value < INFINITY) {
          CHECK(std::abs(score - first * scaled.scale) <= 1e-6f * std::abs(score));
        }
      }
    }
  }
}

}  // namespace
}  // namespace bridge_stg

int main() {
  bridge_stg::test_selection();
  bridge_stg::test_elements();
  bridge_stg::test_problems<float>(1e-4);
  bridge_stg::test_problems<bridge_stg::BFloat16>(1e-2);
  bridge_stg::test_problems<bridge_stg::Float16>(2e-3);
  bridge_stg::test_cosine_range<float>();
  bridge_stg::test_cosine_range<bridge_stg::BFloat16>();
  std::puts("prune_tokens: all hold");
}
