#include <cmath>
#include <cstdio>
#include <iostream>
#include <optional>

#include <ATen/ATen.h>

#include "data/ngram_baseline.h"
#include "model/formats/format_registry.h"
#include "model/weights.h"
#include "train/checkpoint.h"
#include "train/commands/commands.h"
#include "train/evaluate.h"

namespace rwkv {
namespace {

constexpr const char* kExample = "rookery eval --model runs/mine --data corpus/validation";

void print_row(const char* what, double loss, double bytes_per_token) {
  std::printf("%-10s loss %.4f  perplexity %10.2f", what, loss, std::exp(loss));
  if (bytes_per_token > 0) {
    std::printf("  bits per byte %.4f", loss / std::log(2.0) / bytes_per_token);
  }
  std::printf("\n");
}

}  // namespace

int eval_command(int argc, char** argv) {
  cxxopts::Options options("rookery eval",
                           "Cross entropy of a model on a token corpus, in nats a token.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("model",
      "a run, a checkpoint folder, a .pth or .safetensors file",
      cxxopts::value<std::string>());
  add("data", "PREFIX of the corpus to predict", cxxopts::value<std::string>());
  add("baseline",
      "PREFIX of a corpus to count: adds unigram and bigram models of it to compare with",
      cxxopts::value<std::string>());
  add("ctx-len",
      "tokens predicted from an empty state; default: what the model was trained with, else 1024",
      cxxopts::value<int64_t>());
  add("batch-size", "windows at once", cxxopts::value<int64_t>()->default_value("8"));
  add("dtype", "fp32 or bf16", cxxopts::value<std::string>()->default_value("fp32"));
  const auto parsed = parse_options(options, argc, argv, kExample, {"model", "data"});
  if (!parsed) {
    return 0;
  }
  const ComputeDtype dtype = parse_dtype((*parsed)["dtype"].as<std::string>());
  const std::string path = find_model((*parsed)["model"].as<std::string>());
  const BinidxFile corpus((*parsed)["data"].as<std::string>());
  std::optional<BinidxFile> counted;
  if (parsed->count("baseline") > 0) {
    counted.emplace((*parsed)["baseline"].as<std::string>());
  }
  const auto trained_as = config_in(read_weights(path));
  int64_t ctx_len = trained_as ? trained_as->model.ctx_len : 1024;
  if (parsed->count("ctx-len") > 0) {
    ctx_len = (*parsed)["ctx-len"].as<int64_t>();
  }
  const int64_t batch_size = (*parsed)["batch-size"].as<int64_t>();
  if (ctx_len < 1 || batch_size < 1) {
    throw std::invalid_argument("--ctx-len and --batch-size must be 1 or more");
  }
  const RwkvModel model =
      open_model(path, dtype == ComputeDtype::kBf16 ? at::kBFloat16 : at::kFloat);
  // Counted first, and printed last: a failure leaves no half result on stdout.
  std::optional<NgramBaseline> baseline;
  if (counted) {
    baseline = ngram_baseline(*counted, corpus, model->config().vocab_size);
  }
  const Evaluation result = evaluate(model, corpus, {.ctx_len = ctx_len, .batch_size = batch_size});

  const auto& record = corpus.tokenizer_record();
  const double bytes_per_token =
      record ? static_cast<double>(record->text_bytes) / static_cast<double>(corpus.num_tokens())
             : 0;
  std::printf("%s: %lld tokens predicted, %lld at a time\n",
              corpus.prefix().c_str(),
              static_cast<long long>(result.num_tokens),
              static_cast<long long>(ctx_len));
  print_row("model", result.loss, bytes_per_token);
  if (baseline) {
    print_row("bigram", baseline->bigram_loss, bytes_per_token);
    print_row("unigram", baseline->unigram_loss, bytes_per_token);
  }
  return 0;
}

}  // namespace rwkv
