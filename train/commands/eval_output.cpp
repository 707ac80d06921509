#include "train/commands/eval_output.h"

#include <cmath>
#include <cstdio>
#include <iostream>

#include <nlohmann/json.hpp>

namespace rwkv {
namespace {

// Keys in the order in which they are written here.
using Json = nlohmann::ordered_json;

constexpr const char* kQuantileNames[] = {"min", "10%", "25%", "median", "75%", "90%", "max"};
static_assert(std::size(kQuantileNames) == std::size(kQuantiles));

double bits_per_byte(double loss, double bytes_per_token) {
  return loss / std::log(2.0) / bytes_per_token;
}

long long printable(int64_t count) {
  return static_cast<long long>(count);
}

void print_loss(const char* name, double loss, const std::optional<double>& bytes_per_token) {
  std::printf("%-10s loss %.4f  perplexity %10.2f", name, loss, std::exp(loss));
  if (bytes_per_token) {
    std::printf("  bits per byte %.4f", bits_per_byte(loss, *bytes_per_token));
  }
  std::printf("\n");
}

void print_documents(const DocumentSummary& summary) {
  std::printf("documents  mean %.4f", summary.mean);
  for (size_t i = 0; i < summary.quantiles.size(); ++i) {
    std::printf("  %s %.4f", kQuantileNames[i], summary.quantiles[i]);
  }
  std::printf("\n");
  for (const DocumentLoss& document : summary.worst) {
    std::printf("worst      loss %.4f  perplexity %10.2f  document %lld, %lld tokens",
                document.loss,
                std::exp(document.loss),
                printable(document.document),
                printable(document.num_tokens));
    if (!document.opening.empty()) {
      std::printf(": %s", document.opening.c_str());
    }
    std::printf("\n");
  }
}

void print_positions(const std::vector<PositionLoss>& positions) {
  for (const PositionLoss& range : positions) {
    std::printf("position   loss %.4f  perplexity %10.2f  after %lld",
                range.loss,
                std::exp(range.loss),
                printable(range.first));
    if (range.last > range.first) {
      std::printf(" to %lld", printable(range.last));
    }
    std::printf(range.last > 1 ? " tokens" : " token");
    std::printf(" (%lld predictions)\n", printable(range.num_tokens));
  }
}

Json losses(double loss, const std::optional<double>& bytes_per_token) {
  Json json{{"loss", loss}, {"perplexity", std::exp(loss)}};
  if (bytes_per_token) {
    json["bits_per_byte"] = bits_per_byte(loss, *bytes_per_token);
  }
  return json;
}

Json to_json(const DocumentLoss& document) {
  std::optional<double> bytes_per_token;
  if (document.text_bytes) {
    bytes_per_token =
        static_cast<double>(*document.text_bytes) / static_cast<double>(document.num_tokens);
  }
  Json json{{"document", document.document}, {"tokens", document.num_tokens}};
  json.update(losses(document.loss, bytes_per_token));
  return json;
}

Json to_json(const EvalOutput::Documents& documents) {
  Json json{{"count", documents.each.size()},
            {"passed_over", documents.num_passed_over},
            {"mean_loss", documents.summary.mean}};
  for (size_t i = 0; i < documents.summary.quantiles.size(); ++i) {
    json["quantiles"].push_back(
        {{"share", kQuantiles[i]}, {"loss", documents.summary.quantiles[i]}});
  }
  for (const DocumentLoss& document : documents.summary.worst) {
    json["worst"].push_back(to_json(document));
    json["worst"].back()["opening"] = document.opening;
  }
  for (const DocumentLoss& document : documents.each) {
    json["each"].push_back(to_json(document));
  }
  return json;
}

Json to_json(const std::vector<PositionLoss>& positions) {
  Json json = Json::array();
  for (const PositionLoss& range : positions) {
    json.push_back({{"first", range.first},
                    {"last", range.last},
                    {"tokens", range.num_tokens},
                    {"loss", range.loss},
                    {"perplexity", std::exp(range.loss)}});
  }
  return json;
}

// A path may be any bytes, JSON is UTF-8.
void print(const Json& json) {
  std::cout << json.dump(2, ' ', false, Json::error_handler_t::replace) << '\n';
}

}  // namespace

void print_text(const EvalOutput& output) {
  std::printf("%s: %lld tokens predicted, %lld at a time\n",
              output.source.c_str(),
              printable(output.evaluation.num_tokens),
              printable(output.ctx_len));
  if (output.documents) {
    std::printf("%lld documents, each by itself", printable(std::ssize(output.documents->each)));
    if (output.documents->num_passed_over > 0) {
      std::printf("; %lld without a token to predict",
                  printable(output.documents->num_passed_over));
    }
    std::printf("\n");
  }
  print_loss("model", output.evaluation.loss, output.bytes_per_token);
  for (const auto& [name, loss] : output.baselines) {
    print_loss(name.c_str(), loss, output.bytes_per_token);
  }
  if (output.documents) {
    print_documents(output.documents->summary);
  }
  if (output.with_positions) {
    print_positions(output.evaluation.by_position);
  }
}

void print_json(const EvalOutput& output) {
  Json json{{"model", output.model},
            {"source", output.source},
            {"ctx_len", output.ctx_len},
            {"tokens", output.evaluation.num_tokens}};
  json.update(losses(output.evaluation.loss, output.bytes_per_token));
  for (const auto& [name, loss] : output.baselines) {
    json["baselines"][name] = losses(loss, output.bytes_per_token);
  }
  if (output.documents) {
    json["documents"] = to_json(*output.documents);
  }
  if (output.with_positions) {
    json["positions"] = to_json(output.evaluation.by_position);
  }
  print(json);
}

void print_text(const LambadaResult& result, const std::string& path) {
  std::printf("%s: the last words of %lld passages predicted, %lld tokens\n",
              path.c_str(),
              printable(result.num_documents),
              printable(result.num_target_tokens));
  std::printf("lambada    accuracy %.4f  perplexity %10.2f\n", result.accuracy, result.perplexity);
}

void print_json(const LambadaResult& result, const std::string& path, const std::string& model) {
  print({{"model", model},
         {"source", path},
         {"passages", result.num_documents},
         {"target_tokens", result.num_target_tokens},
         {"accuracy", result.accuracy},
         {"perplexity", result.perplexity}});
}

}  // namespace rwkv
