#include <chrono>
#include <cmath>
#include <optional>
#include <stdexcept>

#include <ATen/ATen.h>

#include <spdlog/spdlog.h>

#include "data/ngram_baseline.h"
#include "model/formats/format_registry.h"
#include "train/commands/commands.h"
#include "train/commands/eval_output.h"
#include "train/commands/model_options.h"
#include "train/model_tokenizer.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

constexpr const char* kExample = "rookery eval --model runs/mine --data corpus/validation";
constexpr int64_t kDefaultCtxLen = 1024;
constexpr size_t kNumWorst = 5;

template <typename T>
std::optional<T> given(const cxxopts::ParseResult& parsed, const std::string& option) {
  return parsed.count(option) > 0 ? std::optional(parsed[option].as<T>()) : std::nullopt;
}

cxxopts::Options describe_options() {
  cxxopts::Options options(
      "rookery eval",
      "How well a model predicts a text: cross entropy in nats a token, perplexity, bits per byte\n"
      "of text. Of three things one is predicted:\n"
      "  --data     a token corpus, in windows that run across its documents as in training, or\n"
      "             with --by-document each document by itself\n"
      "  --text     text files, each document by itself: from an empty state, after the\n"
      "             tokenizer's end-of-document token; the document's end is not predicted\n"
      "  --lambada  the last word of each passage, as RWKV-LM counts it\n");
  cxxopts::OptionAdder add = options.add_options();
  add("model",
      "a run, a checkpoint folder, a .pth or .safetensors file",
      cxxopts::value<std::string>());
  add("data", "PREFIX of the corpus to predict", cxxopts::value<std::string>());
  add("text",
      "a .txt or .jsonl file, also .gz or .zst; may be given several times",
      cxxopts::value<std::vector<std::string>>());
  add("lambada", "a .jsonl file of passages", cxxopts::value<std::string>());
  add("tokenizer", "default: the one the model was trained with", cxxopts::value<std::string>());
  add("jsonl-key",
      "key of the text in .jsonl rows",
      cxxopts::value<std::string>()->default_value("text"));
  add("baseline",
      "PREFIX of a corpus to count: adds unigram and bigram models of it to compare with",
      cxxopts::value<std::string>());
  add("by-document",
      "how the loss differs between documents, and the worst of them; with --json each of them");
  add("by-position", "how the loss falls with the tokens read before");
  add("ctx-len",
      "tokens predicted from an empty state; default: what the model was trained with, else 1024",
      cxxopts::value<int64_t>());
  add("batch-size", "windows at once", cxxopts::value<int64_t>()->default_value("8"));
  add_model_options(add);
  add("json", "print one JSON object");
  return options;
}

void refuse(const cxxopts::ParseResult& parsed,
            const std::vector<std::string>& options,
            const std::string& reason) {
  for (const std::string& option : options) {
    if (parsed.count(option) > 0) {
      throw std::invalid_argument("--" + option + " has no use with " + reason + "; leave it out");
    }
  }
}

void check_options(const cxxopts::ParseResult& parsed) {
  const size_t sources =
      std::min<size_t>(parsed.count("text"), 1) + parsed.count("data") + parsed.count("lambada");
  if (sources != 1) {
    throw std::invalid_argument("rookery eval: one of --data, --text and --lambada is needed, " +
                                std::to_string(sources) + " are given; for example: " + kExample);
  }
  if (parsed.count("lambada") > 0) {
    refuse(parsed, {"baseline", "by-document", "by-position", "ctx-len", "jsonl-key"}, "--lambada");
  }
  if (parsed.count("data") > 0) {
    refuse(parsed, {"jsonl-key"}, "--data");
  }
  if (parsed.count("text") > 0) {
    refuse(parsed, {"baseline"}, "--text, which is no counted corpus");
  }
  if (parsed.count("by-document") > 0) {
    refuse(parsed, {"baseline"}, "--by-document: it counts across documents");
  }
}

// Says now and then how far a long evaluation is.
std::function<void(int64_t)> log_progress(const char* what) {
  using Clock = std::chrono::steady_clock;
  return [what, last = Clock::now()](int64_t done) mutable {
    if (Clock::now() - last >= std::chrono::seconds(10)) {
      spdlog::info("{} {} so far", done, what);
      last = Clock::now();
    }
  };
}

// What every kind of evaluation starts from.
struct Evaluated {
  WeightFile file;
  RwkvModel model;
  std::optional<std::string> tokenizer_spec;
  EvaluateOptions options;
};

Evaluated open(const cxxopts::ParseResult& parsed) {
  const std::string path = find_model(parsed["model"].as<std::string>(), Scrutiny::kWeights);
  WeightFile file = read_weights(path);
  const auto trained_as = config_in(file);
  EvaluateOptions options{
      .ctx_len = given<int64_t>(parsed, "ctx-len")
                     .value_or(trained_as ? trained_as->model.ctx_len : kDefaultCtxLen),
      .batch_size = parsed["batch-size"].as<int64_t>(),
      .progress = log_progress("tokens predicted")};
  if (options.ctx_len < 1 || options.batch_size < 1) {
    throw std::invalid_argument("--ctx-len and --batch-size must be 1 or more");
  }
  RwkvModel model = open_model_with(parsed, path);
  return {.file = std::move(file),
          .model = std::move(model),
          .tokenizer_spec = given<std::string>(parsed, "tokenizer"),
          .options = std::move(options)};
}

EvalOutput::Documents summarised(DocumentEvaluation& evaluation) {
  const DocumentSummary summary = summarise(evaluation.documents, kNumWorst);
  return {.each = std::move(evaluation.documents),
          .num_passed_over = evaluation.num_passed_over,
          .summary = summary};
}

std::optional<double> bytes_a_token(int64_t bytes, int64_t tokens) {
  return static_cast<double>(bytes) / static_cast<double>(tokens);
}

// The corpus as training reads it.
EvalOutput evaluate_windows(const Evaluated& evaluated,
                            const BinidxFile& corpus,
                            const std::optional<std::string>& counted) {
  EvalOutput output;
  // Counted first, printed last: a failure leaves no half result on stdout.
  if (counted) {
    const BinidxFile counted_corpus(*counted);
    require_tokenizer_of(evaluated.file, counted_corpus);
    const NgramBaseline baseline =
        ngram_baseline(counted_corpus, corpus, evaluated.model->config().vocab_size);
    output.baselines = {{"bigram", baseline.bigram_loss}, {"unigram", baseline.unigram_loss}};
  }
  output.evaluation = evaluate(evaluated.model, corpus, evaluated.options);
  if (const auto& record = corpus.tokenizer_record()) {
    output.bytes_per_token = bytes_a_token(record->text_bytes, corpus.num_tokens());
  }
  return output;
}

// The one that is named, or the configured one if it is still there: a corpus with a record needs
// it for the openings of documents alone.
std::unique_ptr<Tokenizer> tokenizer_of_documents(const Evaluated& evaluated,
                                                  const BinidxFile& corpus) {
  const auto trained_as = config_in(evaluated.file);
  if (!evaluated.tokenizer_spec && !(trained_as && trained_as->data.tokenizer)) {
    return nullptr;
  }
  try {
    return open_tokenizer_of(evaluated.file, evaluated.tokenizer_spec);
  } catch (const std::exception& error) {
    if (evaluated.tokenizer_spec || !corpus.tokenizer_record()) {
      throw;
    }
    spdlog::info("documents are shown without their text: {}", error.what());
    return nullptr;
  }
}

// The corpus' documents each by itself. Without a record or a tokenizer, nobody knows which token
// stands between them.
EvalOutput evaluate_corpus_documents(const Evaluated& evaluated, const BinidxFile& corpus) {
  const std::unique_ptr<Tokenizer> tokenizer = tokenizer_of_documents(evaluated, corpus);
  const auto& record = corpus.tokenizer_record();
  const std::optional<int32_t> end = record      ? record->end_of_document
                                     : tokenizer ? tokenizer->end_of_document()
                                                 : std::nullopt;
  DocumentEvaluation evaluation = evaluate_documents(
      evaluated.model,
      documents_of(corpus, evaluated.model->config().vocab_size, end, tokenizer.get()),
      end,
      evaluated.options);
  EvalOutput output{.evaluation = evaluation.tokens, .documents = summarised(evaluation)};
  if (record && end) {
    output.bytes_per_token = bytes_a_token(record->text_bytes, evaluation.tokens.num_tokens);
  }
  return output;
}

EvalOutput evaluate_corpus(const Evaluated& evaluated,
                           const std::string& prefix,
                           const cxxopts::ParseResult& parsed) {
  const BinidxFile corpus(prefix);
  require_tokenizer_of(evaluated.file, corpus);
  EvalOutput output =
      parsed.count("by-document") > 0
          ? evaluate_corpus_documents(evaluated, corpus)
          : evaluate_windows(evaluated, corpus, given<std::string>(parsed, "baseline"));
  output.source = corpus.prefix();
  return output;
}

EvalOutput evaluate_text(const Evaluated& evaluated,
                         const std::vector<std::string>& paths,
                         const cxxopts::ParseResult& parsed) {
  const auto tokenizer = open_tokenizer_of(evaluated.file, evaluated.tokenizer_spec);
  require_vocabulary_for(*tokenizer, evaluated.model->config().vocab_size);
  TextReader reader(paths, {.jsonl_key = parsed["jsonl-key"].as<std::string>()});
  DocumentEvaluation evaluation = evaluate_documents(evaluated.model,
                                                     documents_of(reader, *tokenizer),
                                                     tokenizer->end_of_document(),
                                                     evaluated.options);
  EvalOutput output{.evaluation = evaluation.tokens};
  for (const std::string& path : paths) {
    output.source += (output.source.empty() ? "" : ", ") + path;
  }
  if (evaluation.text_bytes) {
    output.bytes_per_token = bytes_a_token(*evaluation.text_bytes, evaluation.tokens.num_tokens);
  }
  if (parsed.count("by-document") > 0) {
    output.documents = summarised(evaluation);
  }
  return output;
}

// After it was printed: what is wrong shows in the other figures.
void require_finite(double figure, const char* name, const std::string& model) {
  if (!std::isfinite(figure)) {
    throw std::runtime_error(model + ": its " + name + " is " +
                             (std::isnan(figure) ? "not a number" : "infinite") +
                             ", expected a finite number; rookery inspect " + model +
                             " shows whether weights are not finite");
  }
}

void run_lambada(const Evaluated& evaluated, const std::string& path, bool json) {
  const auto tokenizer = open_tokenizer_of(evaluated.file, evaluated.tokenizer_spec);
  require_vocabulary_for(*tokenizer, evaluated.model->config().vocab_size);
  const LambadaResult result = evaluate_lambada(evaluated.model,
                                                *tokenizer,
                                                path,
                                                evaluated.options.batch_size,
                                                log_progress("passages done"));
  if (json) {
    print_json(result, path, evaluated.file.path);
  } else {
    print_text(result, path);
  }
  require_finite(result.perplexity, "perplexity", evaluated.file.path);
}

}  // namespace

int eval_command(int argc, char** argv) {
  cxxopts::Options options = describe_options();
  const auto parsed = parse_options(options, argc, argv, kExample, {"model"});
  if (!parsed) {
    return 0;
  }
  check_options(*parsed);
  const Evaluated evaluated = open(*parsed);
  const bool json = parsed->count("json") > 0;
  if (const auto lambada = given<std::string>(*parsed, "lambada")) {
    run_lambada(evaluated, *lambada, json);
    return 0;
  }
  const auto data = given<std::string>(*parsed, "data");
  EvalOutput output =
      data ? evaluate_corpus(evaluated, *data, *parsed)
           : evaluate_text(evaluated, (*parsed)["text"].as<std::vector<std::string>>(), *parsed);
  output.model = evaluated.file.path;
  output.ctx_len = evaluated.options.ctx_len;
  output.with_positions = parsed->count("by-position") > 0;
  if (json) {
    print_json(output);
  } else {
    print_text(output);
  }
  require_finite(output.evaluation.loss, "loss", output.model);
  return 0;
}

}  // namespace rwkv
