#include <cmath>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/ngram_baseline.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::HasSubstr;

class NgramBaselineTest : public testing::Test {
 protected:
  BinidxFile corpus(const std::string& name, const std::vector<int32_t>& ids) {
    BinidxWriter writer(folder_.path(name), {"x", 65536, std::nullopt, 0});
    writer.add_tokens(ids);
    writer.end_document();
    writer.finish(1);
    return BinidxFile(folder_.path(name));
  }

  test::TempFolder folder_;
};

TEST_F(NgramBaselineTest, MatchesTheFormulaByHand) {
  // N = 5, V = 4; c = 2, 2, 1, 0; pairs 01 10 01 12; 0 has one follower, 1 has two.
  const BinidxFile train = corpus("train", {0, 1, 0, 1, 2});
  const BinidxFile validation = corpus("validation", {3, 0, 1, 3, 2, 1});
  const NgramBaseline loss = ngram_baseline(train, validation, 4);
  const double p0 = 3.0 / 9;
  const double p1 = 3.0 / 9;
  const double p2 = 2.0 / 9;
  const double p3 = 1.0 / 9;
  EXPECT_NEAR(loss.unigram_loss, -std::log(p0 * p1 * p3 * p2 * p1) / 5, 1e-14);
  // 0 after 3, which never was; 1 after 0; 3 after 1, a new pair; 2 after 3; 1 after 2, the last.
  const double product = p0 * ((2 + 1 * p1) / (2 + 1)) * ((0 + 2 * p3) / (2 + 2)) * p2 * p1;
  EXPECT_NEAR(loss.bigram_loss, -std::log(product) / 5, 1e-14);
}

// Values of a program in Python that counts with dictionaries.
TEST_F(NgramBaselineTest, MatchesAnotherProgramOnTheDemoCorpus) {
  const std::string demo_path = test::find_test_data("derived/binidx/demo_world_noshuffle.idx");
  SKIP_WITHOUT(demo_path);
  const BinidxFile demo(demo_path);
  const BinidxFile tiny(test::find_test_data("derived/binidx/tiny3.idx"));
  const NgramBaseline same = ngram_baseline(demo, demo, 65536);
  EXPECT_NEAR(same.unigram_loss, 7.64544449948833, 1e-11);
  EXPECT_NEAR(same.bigram_loss, 3.07068400923887, 1e-11);
  const NgramBaseline other = ngram_baseline(demo, tiny, 65536);
  EXPECT_NEAR(other.unigram_loss, 7.78600709436216, 1e-11);
  EXPECT_NEAR(other.bigram_loss, 9.41932192571284, 1e-11);
  const NgramBaseline poor = ngram_baseline(tiny, demo, 65536);
  EXPECT_NEAR(poor.unigram_loss, 11.080053006879, 1e-11);
  EXPECT_NEAR(poor.bigram_loss, 11.0884539081417, 1e-11);
}

TEST_F(NgramBaselineTest, GivesProbabilitiesThatSumToOne) {
  const BinidxFile train = corpus("train", {0, 1, 0, 1, 2, 2, 2, 4, 0, 3});
  for (int32_t before = 0; before < 6; ++before) {
    double unigram = 0;
    double bigram = 0;
    for (int32_t id = 0; id < 6; ++id) {
      const NgramBaseline loss = ngram_baseline(train, corpus("pair", {before, id}), 6);
      unigram += std::exp(-loss.unigram_loss);
      bigram += std::exp(-loss.bigram_loss);
    }
    EXPECT_NEAR(unigram, 1, 1e-12);
    EXPECT_NEAR(bigram, 1, 1e-12) << "after " << before;
  }
}

TEST_F(NgramBaselineTest, CrossesTheStretchesItReads) {
  // 0 1 0 1 ...: the bigram is all but certain wherever a stretch ends, the unigram is a coin.
  std::vector<int32_t> ids(200'001);
  for (size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<int32_t>(i % 2);
  }
  const BinidxFile file = corpus("a", ids);
  const NgramBaseline loss = ngram_baseline(file, file, 2);
  EXPECT_NEAR(loss.unigram_loss, std::log(2.0), 1e-6);
  EXPECT_NEAR(loss.bigram_loss, 0, 1e-5);
}

TEST_F(NgramBaselineTest, RefusesIdsBeyondTheVocabularyAndCorporaTooShort) {
  const BinidxFile fine = corpus("fine", {0, 1, 2});
  const BinidxFile large = corpus("large", {0, 9});
  const BinidxFile one = corpus("one", {0});
  for (const auto& [train, validation] : {std::pair{&fine, &large}, std::pair{&large, &fine}}) {
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, ngram_baseline(*train, *validation, 9)),
                AllOf(HasSubstr("large.bin"), HasSubstr("position 1 has id 9")));
  }
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, ngram_baseline(fine, one, 9)),
              HasSubstr("one.bin: 1 token"));
  EXPECT_NO_THROW(ngram_baseline(one, fine, 9));
  EXPECT_THROW(ngram_baseline(fine, fine, 0), std::invalid_argument);
}

}  // namespace
}  // namespace rwkv
