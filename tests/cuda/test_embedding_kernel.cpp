// embedding against its definition in float64.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cuda/embedding_kernel.h"
#include "tests/cuda/kernel_test.h"

namespace rwkv::test {
namespace {

template <typename Element>
class EmbeddingKernel : public testing::Test {};
using Elements = testing::Types<float, __nv_bfloat16>;
TYPED_TEST_SUITE(EmbeddingKernel, Elements);

// Of sums of tens of rows in fp32, rounded once.
template <typename Element>
constexpr double kTolerance = sizeof(Element) == 2 ? 3e-3 : 1e-6;

using Tokens = std::vector<int64_t>;

Numbers to_numbers(const Tokens& tokens) {
  return Numbers(tokens.begin(), tokens.end());
}

// Few tokens of a vocabulary are frequent, most never occur.
Tokens drawn(int64_t N, int64_t V) {
  Tokens tokens;
  for (const double number : normal(N, 7, 3)) {
    tokens.push_back(static_cast<int64_t>(std::abs(number)) % V);
  }
  return tokens;
}

// The positions, stably sorted by token.
Tokens sorted_order(const Tokens& tokens) {
  Tokens order(tokens.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return tokens[static_cast<size_t>(i)] < tokens[static_cast<size_t>(j)];
  });
  return order;
}

// The gradient; dy lies `offset` elements behind an aligned address.
template <typename Element>
Numbers backward(
    const Numbers& dy, const Tokens& tokens, int64_t V, int64_t C, int64_t offset = 0) {
  const auto N = static_cast<int64_t>(tokens.size());
  const Tokens order = sorted_order(tokens);
  Tokens sorted;
  for (const int64_t position : order) {
    sorted.push_back(tokens[static_cast<size_t>(position)]);
  }
  Numbers shifted(static_cast<size_t>(offset), 7);
  shifted.insert(shifted.end(), dy.begin(), dy.end());
  const DeviceArray<Element> dev_dy(shifted);
  const DeviceArray<int64_t> dev_sorted(to_numbers(sorted)), dev_order(to_numbers(order));
  DeviceArray<Element> dweight(V * C);
  DeviceArray<float> scratch(embedding_backward_scratch_size(N, C));
  const EmbeddingBackward<Element> arguments{.N = N,
                                             .V = V,
                                             .C = C,
                                             .dy = dev_dy.data() + offset,
                                             .sorted_tokens = dev_sorted.data(),
                                             .order = dev_order.data(),
                                             .dweight = dweight.data(),
                                             .scratch = scratch.data()};
  expect_launched(launch_embedding_backward(arguments, nullptr), "embedding backward");
  return dweight.numbers();
}

Numbers reference(const Numbers& dy, const Tokens& tokens, int64_t V, int64_t C) {
  Numbers dweight(static_cast<size_t>(V * C), 0.0);
  for (size_t n = 0; n < tokens.size(); ++n) {
    for (int64_t c = 0; c < C && tokens[n] >= 0 && tokens[n] < V; ++c) {
      dweight[static_cast<size_t>(tokens[n] * C + c)] +=
          dy[n * static_cast<size_t>(C) + static_cast<size_t>(c)];
    }
  }
  return dweight;
}

TYPED_TEST(EmbeddingKernel, RowsAreThoseOfTheTable) {
  constexpr int64_t kV = 37;
  for (const int64_t C : {1, 63, 64, 65, 768, 1032}) {
    for (const int64_t N : {1, 3, 4, 17}) {
      const Numbers weight = rounded<TypeParam>(normal(kV * C, 1));
      Tokens tokens = drawn(N, kV);
      tokens[0] = kV - 1;
      const auto outputs = same_in_every_order([&] {
        const DeviceArray<TypeParam> dev_weight(weight);
        const DeviceArray<int64_t> dev_tokens(to_numbers(tokens));
        DeviceArray<TypeParam> out(N * C);
        const EmbeddingForward<TypeParam> arguments{.N = N,
                                                    .V = kV,
                                                    .C = C,
                                                    .weight = dev_weight.data(),
                                                    .tokens = dev_tokens.data(),
                                                    .out = out.data()};
        expect_launched(launch_embedding(arguments, nullptr), "embedding");
        return Outputs{out.numbers()};
      });
      Numbers expected;
      for (const int64_t token : tokens) {
        expected.insert(
            expected.end(), weight.begin() + token * C, weight.begin() + (token + 1) * C);
      }
      EXPECT_EQ(outputs[0], expected) << N << " rows of " << C;
    }
  }
}

TYPED_TEST(EmbeddingKernel, ATokenOutOfRangeIsARowOfNaN) {
  const DeviceArray<TypeParam> weight(normal(5 * 8, 1));
  const DeviceArray<int64_t> tokens(Numbers{4, -1, 5, 0, 1e12, -1e12});
  DeviceArray<TypeParam> out(6 * 8);
  const EmbeddingForward<TypeParam> arguments{
      .N = 6, .V = 5, .C = 8, .weight = weight.data(), .tokens = tokens.data(), .out = out.data()};
  expect_launched(launch_embedding(arguments, nullptr), "embedding");
  for (size_t i = 0; i < 48; ++i) {
    EXPECT_EQ(std::isnan(out.numbers()[i]), i / 8 != 0 && i / 8 != 3) << i;
  }
}

TYPED_TEST(EmbeddingKernel, BackwardMatchesTheDefinition) {
  constexpr int64_t kV = 37;
  for (const int64_t C : {1, 63, 64, 65, 768, 1032}) {
    for (const int64_t N : {1, 15, 16, 17, 32, 33, 63, 129, 257}) {
      if (C > 65 && N > 32 && N < 257) {
        continue;  // columns and pieces do not meet
      }
      const Numbers dy = rounded<TypeParam>(normal(N * C, 2));
      const Tokens tokens = drawn(N, kV);
      const auto outputs =
          same_in_every_order([&] { return Outputs{backward<TypeParam>(dy, tokens, kV, C)}; });
      EXPECT_TRUE(close(outputs[0], reference(dy, tokens, kV, C), kTolerance<TypeParam>))
          << N << " rows of " << C;
    }
  }
}

// Runs of equal tokens by their lengths: pieces are of 32 rows, and each way in which a run can lie
// to their bounds occurs.
TYPED_TEST(EmbeddingKernel, RunsLieToPiecesInEveryWay) {
  constexpr int64_t kC = 8;
  const std::vector<Tokens> cases{{32},
                                  {33},
                                  {64, 1},
                                  {32, 32, 32},        // each a piece
                                  {31, 2, 31},         // one over a bound
                                  {1, 31, 70, 2},      // up to a bound, from a bound over the next
                                  {10, 100, 10},       // over several
                                  {10, 54, 32, 5},     // up to a bound after several
                                  {1, 32, 32, 32, 1},  // each over a bound, none within
                                  {500},               // all rows
                                  {3, 700, 1, 1, 97}};
  for (const Tokens& lengths : cases) {
    Tokens tokens;
    for (size_t run = 0; run < lengths.size(); ++run) {
      tokens.insert(
          tokens.end(), static_cast<size_t>(lengths[run]), static_cast<int64_t>(2 * run + 1));
    }
    const auto N = static_cast<int64_t>(tokens.size());
    const auto V = static_cast<int64_t>(2 * lengths.size() + 1);
    // Where they stood.
    for (size_t i = 0; i < tokens.size(); ++i) {
      std::swap(tokens[i], tokens[i * 7919 % tokens.size()]);
    }
    // Sums of small integers are exact: any order gives these numbers, a row too many does not.
    Numbers dy;
    for (int64_t i = 0; i < N * kC; ++i) {
      dy.push_back(static_cast<double>(i * 7 % 13 - 6));
    }
    const Numbers expected = rounded<TypeParam>(reference(dy, tokens, V, kC));
    EXPECT_EQ(backward<TypeParam>(dy, tokens, V, kC), expected) << lengths[0] << "...";
  }
}

TYPED_TEST(EmbeddingKernel, AFrequentTokenKeepsItsPrecision) {
  // 4000 ones: a sum in bf16 would stay at 256.
  const Numbers dy(4000 * 8, 1.0);
  const Numbers expected(8, rounded<TypeParam>({4000})[0]);
  EXPECT_EQ(backward<TypeParam>(dy, Tokens(4000, 0), 1, 8), expected);
}

TYPED_TEST(EmbeddingKernel, TokensOutOfRangeAreLeftOut) {
  constexpr int64_t kV = 5, kC = 8;
  Tokens tokens{-1, 0, 4, 5, 1000000};
  // As runs over several pieces, too.
  for (const int64_t token : {int64_t{-7}, int64_t{2}, kV}) {
    tokens.insert(tokens.begin(), 100, token);
  }
  const Numbers dy = rounded<TypeParam>(normal(static_cast<int64_t>(tokens.size()) * kC, 2));
  EXPECT_TRUE(close(backward<TypeParam>(dy, tokens, kV, kC),
                    reference(dy, tokens, kV, kC),
                    kTolerance<TypeParam>));
}

TYPED_TEST(EmbeddingKernel, RowsNeedNoAlignment) {
  constexpr int64_t kV = 5, kC = 64;
  const Tokens tokens = drawn(70, kV);
  const Numbers dy = rounded<TypeParam>(normal(70 * kC, 2));
  EXPECT_TRUE(close(backward<TypeParam>(dy, tokens, kV, kC, 1),
                    reference(dy, tokens, kV, kC),
                    kTolerance<TypeParam>));
}

TYPED_TEST(EmbeddingKernel, NoTokensGiveZerosAndNoColumnsNothing) {
  DeviceArray<TypeParam> dweight(12);
  using Forward = EmbeddingForward<TypeParam>;
  using Backward = EmbeddingBackward<TypeParam>;
  expect_launched(launch_embedding_backward(
                      Backward{.N = 0, .V = 3, .C = 4, .dweight = dweight.data()}, nullptr),
                  "embedding backward");
  EXPECT_EQ(dweight.numbers(), Numbers(12, 0.0));
  EXPECT_EQ(launch_embedding_backward(Backward{.N = 3, .V = 5, .C = 0}, nullptr), cudaSuccess);
  EXPECT_EQ(launch_embedding(Forward{.N = 0, .V = 3, .C = 4}, nullptr), cudaSuccess);
  EXPECT_EQ(launch_embedding(Forward{.N = 3, .V = 5, .C = 0}, nullptr), cudaSuccess);
}

}  // namespace
}  // namespace rwkv::test
