#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/byte_tokenizer.h"
#include "tests/support/test_data.h"
#include "train/evaluate.h"
#include "train/evaluate_documents.h"
#include "train/evaluate_lambada.h"
#include "train/predict_sequences.h"

namespace rwkv {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr int64_t kVocab = 256;

// Random weights that make every token count: a fresh model's logits hardly differ.
RwkvModel lively_model() {
  const at::NoGradGuard no_grad;
  RwkvModel model(ModelConfig{.n_layer = 2, .n_embd = 16, .vocab_size = kVocab});
  model->initialise(1, 1.0);
  at::manual_seed(2);
  for (at::Tensor& parameter : model->parameters()) {
    parameter.add_(at::randn_like(parameter), 0.3);
  }
  return model;
}

std::vector<int64_t> some_ids(int64_t count, int64_t seed) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back((i * i * 31 + seed * 17 + i) % kVocab);
  }
  return ids;
}

// Token by token, the state handed on: nothing shared with predict_sequences() but the model.
std::vector<double> losses_one_by_one(RwkvModel model, const std::vector<int64_t>& ids) {
  const at::NoGradGuard no_grad;
  std::vector<double> losses;
  State state = model->initial_state(1);
  for (size_t i = 0; i + 1 < ids.size(); ++i) {
    auto output = model->forward_last(at::full({1, 1}, ids[i], at::kLong), state);
    losses.push_back(
        -at::log_softmax(output.logits_BV[0].to(at::kDouble), 0)[ids[i + 1]].item<double>());
    state = std::move(output.state);
  }
  return losses;
}

double sum_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

// Documents as they come; no end tokens but those given.
std::string write_corpus(const test::TempFolder& folder,
                         const std::vector<std::vector<int64_t>>& documents,
                         std::optional<int32_t> end_of_document) {
  const std::string prefix = folder.path("corpus");
  BinidxWriter writer(
      prefix, {.identity = "bytes", .vocab_size = kVocab, .end_of_document = end_of_document});
  for (const auto& document : documents) {
    writer.add_tokens(std::vector<int32_t>(document.begin(), document.end()));
    writer.end_document();
  }
  writer.finish(100);
  return prefix;
}

DocumentSource source_of(std::vector<Document> documents) {
  return [documents = std::move(documents), next = size_t{0}]() mutable {
    return next < documents.size() ? std::optional(documents[next++]) : std::nullopt;
  };
}

TEST(PredictSequences, GivesEachSequenceWhatItGetsAlone) {
  const RwkvModel model = lively_model();
  std::vector<std::vector<int64_t>> sequences;
  for (const int64_t length : {5, 2, 17, 9, 2, 30, 3}) {
    sequences.push_back(some_ids(length, length + std::ssize(sequences)));
  }
  for (const int64_t batch_size : {1, 3, 100}) {
    std::vector<int64_t> visits(sequences.size());
    predict_sequences(model, sequences, batch_size, [&](const SequencePrediction& prediction) {
      ++visits[prediction.sequence];
      const auto expected = losses_one_by_one(model, sequences[prediction.sequence]);
      const auto losses = prediction.losses();
      ASSERT_EQ(losses.size(), expected.size());
      for (size_t i = 0; i < losses.size(); ++i) {
        EXPECT_NEAR(losses[i], expected[i], 1e-4) << prediction.sequence << ", " << i;
      }
    });
    EXPECT_THAT(visits, testing::Each(1)) << batch_size;
  }
}

TEST(LossSum, HasARangeForEveryPowerOfTwo) {
  LossSum sum;
  sum.add(std::vector<float>{1, 2, 3, 4, 5, 6});
  sum.add(std::vector<float>{3, 4, 5});
  const Evaluation mean = sum.mean();
  EXPECT_EQ(mean.num_tokens, 9);
  EXPECT_DOUBLE_EQ(mean.loss, 33.0 / 9);
  const auto range = [](int64_t first, int64_t last, int64_t tokens, double loss) {
    return testing::AllOf(testing::Field(&PositionLoss::first, first),
                          testing::Field(&PositionLoss::last, last),
                          testing::Field(&PositionLoss::num_tokens, tokens),
                          testing::Field(&PositionLoss::loss, testing::DoubleEq(loss)));
  };
  EXPECT_THAT(
      mean.by_position,
      ElementsAre(range(1, 1, 2, 2), range(2, 2, 2, 3), range(3, 4, 3, 4), range(5, 6, 2, 5.5)));
}

TEST(Evaluate, CutsTheCorpusIntoWindowsAcrossDocuments) {
  const test::TempFolder folder;
  const RwkvModel model = lively_model();
  const BinidxFile corpus(write_corpus(folder, {some_ids(7, 1), some_ids(15, 2)}, 0));
  std::vector<int64_t> all = some_ids(7, 1);
  all.push_back(0);
  for (const int64_t id : some_ids(15, 2)) {
    all.push_back(id);
  }
  all.push_back(0);
  // 24 tokens, 23 predictions: 10, 10 and 3.
  double sum = 0;
  for (const int64_t begin : {0, 10, 20}) {
    const int64_t end = std::min<int64_t>(begin + 11, 24);
    sum += sum_of(losses_one_by_one(model, {all.begin() + begin, all.begin() + end}));
  }
  for (const int64_t batch_size : {1, 2, 8}) {
    const Evaluation result = evaluate(model, corpus, {.ctx_len = 10, .batch_size = batch_size});
    EXPECT_EQ(result.num_tokens, 23);
    EXPECT_NEAR(result.loss, sum / 23, 1e-4) << batch_size;
    ASSERT_EQ(result.by_position.size(), 5u);
    EXPECT_EQ(result.by_position.front().num_tokens, 3);
    EXPECT_EQ(result.by_position.back().last, 10);
  }
}

TEST(EvaluateDocuments, PredictsEachAfterTheStartTokenAlone) {
  const RwkvModel model = lively_model();
  const std::vector<Document> documents{{.ids = some_ids(12, 1), .text_bytes = 30},
                                        {.ids = {}, .text_bytes = 0},
                                        {.ids = some_ids(1, 2), .text_bytes = 2},
                                        {.ids = some_ids(5, 3), .text_bytes = 9}};
  const DocumentEvaluation result =
      evaluate_documents(model, source_of(documents), 0, {.ctx_len = 100, .batch_size = 2});
  ASSERT_EQ(result.documents.size(), 3u);
  EXPECT_EQ(result.num_passed_over, 1);
  EXPECT_EQ(result.text_bytes, 41);
  EXPECT_EQ(result.tokens.num_tokens, 18);
  double sum = 0;
  for (const DocumentLoss& document : result.documents) {
    std::vector<int64_t> ids = documents[static_cast<size_t>(document.document)].ids;
    EXPECT_EQ(document.num_tokens, std::ssize(ids));
    ids.insert(ids.begin(), 0);
    const double expected = sum_of(losses_one_by_one(model, ids));
    EXPECT_NEAR(document.loss, expected / static_cast<double>(document.num_tokens), 1e-4);
    sum += expected;
  }
  EXPECT_NEAR(result.tokens.loss, sum / 18, 1e-4);
}

TEST(EvaluateDocuments, GivesTheFirstTokenWhereNothingStartsADocument) {
  const RwkvModel model = lively_model();
  const DocumentEvaluation result = evaluate_documents(
      model,
      source_of({{.ids = some_ids(6, 1), .text_bytes = 6}, {.ids = {5}, .text_bytes = 1}}),
      std::nullopt,
      {.batch_size = 2});
  ASSERT_EQ(result.documents.size(), 1u);
  EXPECT_EQ(result.num_passed_over, 1);
  EXPECT_EQ(result.documents[0].num_tokens, 5);
  EXPECT_NEAR(result.tokens.loss, sum_of(losses_one_by_one(model, some_ids(6, 1))) / 5, 1e-4);
  // Some bytes were not predicted, nobody knows how many.
  EXPECT_EQ(result.text_bytes, std::nullopt);
}

TEST(EvaluateDocuments, CutsLongDocumentsIntoWindows) {
  const RwkvModel model = lively_model();
  const std::vector<int64_t> ids = some_ids(120, 4);
  const DocumentEvaluation result =
      evaluate_documents(model, source_of({{.ids = ids}}), 0, {.ctx_len = 3, .batch_size = 2});
  std::vector<int64_t> started = ids;
  started.insert(started.begin(), 0);
  double sum = 0;
  for (int64_t begin = 0; begin < 120; begin += 3) {
    const int64_t end = std::min<int64_t>(begin + 4, 121);
    sum += sum_of(losses_one_by_one(model, {started.begin() + begin, started.begin() + end}));
  }
  ASSERT_EQ(result.documents.size(), 1u);
  EXPECT_EQ(result.documents[0].num_tokens, 120);
  EXPECT_NEAR(result.documents[0].loss, sum / 120, 1e-4);
  EXPECT_EQ(result.tokens.by_position.back().last, 3);
}

TEST(EvaluateDocuments, SaysWhereThereIsNothingToPredict) {
  EXPECT_THAT(THROWN_TEXT(std::runtime_error,
                          evaluate_documents(lively_model(), source_of({{.ids = {}}}), 0, {})),
              HasSubstr("none of the 1 documents has a token to predict"));
}

TEST(DocumentsOf, ACorpusAreThoseWithoutTheirEnds) {
  const test::TempFolder folder;
  const BinidxFile corpus(write_corpus(folder, {{'a', '\n', 'b'}, {'c'}}, 0));
  const ByteTokenizer tokenizer;
  const auto source = documents_of(corpus, kVocab, 0, &tokenizer);
  const auto first = source();
  ASSERT_TRUE(first.has_value());
  EXPECT_THAT(first->ids, ElementsAre('a', '\n', 'b'));
  EXPECT_EQ(first->opening, "a b");
  EXPECT_THAT(source()->ids, ElementsAre('c'));
  EXPECT_EQ(source(), std::nullopt);
  EXPECT_THAT(documents_of(corpus, kVocab, std::nullopt, nullptr)()->ids,
              ElementsAre('a', '\n', 'b', 0));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, documents_of(corpus, 98, 0, nullptr)()),
              HasSubstr("vocabulary has 98 ids"));
}

TEST(DocumentsOf, TextFilesAreWholeAndShowTheirOpening) {
  const test::TempFolder folder;
  const std::string long_text(3'000'000, 'x');
  test::write_file(folder.path("a.txt"), long_text);
  test::write_file(folder.path("b.jsonl"), "{\"text\": \"Gr\\u00fc\\u00dfe\\nan\\u202e\"}\n");
  TextReader reader({folder.path("a.txt"), folder.path("b.jsonl")}, {});
  const ByteTokenizer tokenizer;
  const auto source = documents_of(reader, tokenizer);
  const auto first = source();
  EXPECT_EQ(std::ssize(first->ids), 3'000'000);
  EXPECT_EQ(first->text_bytes, 3'000'000);
  EXPECT_EQ(first->opening, std::string(60, 'x'));
  const auto second = source();
  EXPECT_EQ(second->text_bytes, 13);
  EXPECT_EQ(second->opening, "Grüße an   ");
  EXPECT_EQ(source(), std::nullopt);
}

TEST(Summarise, InterpolatesQuantilesAndListsTheWorstFirst) {
  std::vector<DocumentLoss> documents;
  for (const double loss : {3.0, 1.0, 2.0, 5.0, 4.0, 5.0}) {
    documents.push_back({.document = std::ssize(documents), .num_tokens = 1, .loss = loss});
  }
  const DocumentSummary summary = summarise(documents, 3);
  EXPECT_DOUBLE_EQ(summary.mean, 20.0 / 6);
  // numpy.quantile([1, 2, 3, 4, 5, 5], [0, .1, .25, .5, .75, .9, 1])
  EXPECT_THAT(summary.quantiles,
              testing::Pointwise(testing::DoubleNear(1e-12),
                                 std::vector<double>{1, 1.5, 2.25, 3.5, 4.75, 5, 5}));
  const auto number = [](int64_t document) {
    return testing::Field(&DocumentLoss::document, document);
  };
  EXPECT_THAT(summary.worst, ElementsAre(number(3), number(5), number(4)));
  EXPECT_EQ(summarise(std::span(documents).first(1), 3).worst.size(), 1u);
}

TEST(Summarise, TakesWhatIsNotANumberForTheWorst) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  constexpr double kInf = std::numeric_limits<double>::infinity();
  std::vector<DocumentLoss> documents;
  for (const double loss : {kNan, 1.0, kInf, 2.0, kNan, 3.0, kInf, kInf, kInf}) {
    documents.push_back({.document = std::ssize(documents), .num_tokens = 1, .loss = loss});
  }
  const DocumentSummary summary = summarise(documents, 4);
  std::vector<int64_t> worst;
  for (const DocumentLoss& document : summary.worst) {
    worst.push_back(document.document);
  }
  EXPECT_THAT(worst, ElementsAre(0, 4, 2, 6));
  // Sorted: 1 2 3 inf inf inf inf nan nan.
  EXPECT_EQ(summary.quantiles.front(), 1);
  EXPECT_EQ(summary.quantiles[2], 3);
  EXPECT_EQ(summary.quantiles[3], kInf);
  EXPECT_EQ(summary.quantiles[4], kInf);
  EXPECT_TRUE(std::isnan(summary.quantiles.back()));
}

TEST(Summarise, InterpolatesNothingBetweenInfinities) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const std::vector<DocumentLoss> documents(2, {.num_tokens = 1, .loss = kInf});
  EXPECT_THAT(summarise(documents, 1).quantiles, testing::Each(kInf));
}

TEST(EvaluateLambada, CountsTheLastWordAsOneGuess) {
  const test::TempFolder folder;
  const RwkvModel model = lively_model();
  const std::vector<std::string> passages{"one two three", "a  b", "Who goes there?"};
  std::string rows;
  for (const std::string& passage : passages) {
    rows += "{\"text\": \"" + passage + "\"}\n";
  }
  test::write_file(folder.path("l.jsonl"), rows);
  double sum = 0;
  int64_t num_targets = 0;
  for (const std::string& passage : passages) {
    // Bytes: the encoding of the parts is that of the whole.
    std::vector<int64_t> ids{0};
    ids.insert(ids.end(), passage.begin(), passage.end());
    const auto count = static_cast<int64_t>(passage.size() - passage.rfind(' '));
    const auto losses = losses_one_by_one(model, ids);
    sum += sum_of({losses.end() - count, losses.end()});
    num_targets += count;
  }
  for (const int64_t batch_size : {1, 2, 8}) {
    const LambadaResult result =
        evaluate_lambada(model, ByteTokenizer(), folder.path("l.jsonl"), batch_size);
    EXPECT_EQ(result.num_documents, 3);
    EXPECT_EQ(result.num_target_tokens, num_targets);
    EXPECT_NEAR(std::log(result.perplexity), sum / 3, 1e-3);
    EXPECT_EQ(result.accuracy, 0);
  }
}

TEST(EvaluateLambada, IsRightOnlyWhereEveryTokenIs) {
  const test::TempFolder folder;
  const at::NoGradGuard no_grad;
  // One layer that passes the embedding on, so that the head decides: after any byte the next is
  // that byte plus one; after a space it is 'a'.
  RwkvModel model(ModelConfig{.n_layer = 1, .n_embd = 256, .vocab_size = kVocab});
  model->initialise(1, 1e-4);
  for (auto& item : model->named_parameters()) {
    if (item.key().find("att.output") != std::string::npos ||
        item.key().find("ffn.value") != std::string::npos) {
      item.value().zero_();
    }
  }
  auto parameters = model->named_parameters();
  parameters["emb.weight"].copy_(at::eye(256));
  at::Tensor head = at::eye(256).roll(1, 0);
  head.select(1, ' ').zero_();
  head.index_put_({at::tensor('a'), at::tensor(' ')}, 1.0);
  parameters["head.weight"].copy_(head * 30);
  // "y" is followed by "z", not by a space: the first target token, the space, is never right
  // behind a letter, but is behind the byte 31.
  test::write_file(folder.path("l.jsonl"),
                   "{\"text\": \"x\\u001f abcd\"}\n{\"text\": \"x\\u001f abce\"}\n"
                   "{\"text\": \"x abcd\"}\n{\"text\": \"\\u001f a\"}\n");
  EXPECT_EQ(evaluate_lambada(model, ByteTokenizer(), folder.path("l.jsonl"), 3).accuracy, 0.5);
}

TEST(EvaluateLambada, NamesWhatIsNoPassage) {
  const test::TempFolder folder;
  const RwkvModel model = lively_model();
  const auto text_of = [&](const std::string& rows) {
    test::write_file(folder.path("l.jsonl"), rows);
    return THROWN_TEXT(std::runtime_error,
                       evaluate_lambada(model, ByteTokenizer(), folder.path("l.jsonl"), 2));
  };
  EXPECT_THAT(text_of("{\"text\": \"a b\"}\n{\"text\": \"word\"}\n"),
              HasSubstr("l.jsonl: passage 2: there is no space in it"));
  EXPECT_THAT(text_of("\n"), HasSubstr("holds no passage"));
  EXPECT_THAT(
      THROWN_TEXT(std::invalid_argument, evaluate_lambada(model, ByteTokenizer(), "l.txt", 2)),
      HasSubstr("expected a .jsonl"));
}

}  // namespace
}  // namespace rwkv
