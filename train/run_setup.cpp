#include "train/run_setup.h"

#include <algorithm>
#include <filesystem>
#include <iomanip>
#include <sstream>
#include <stdexcept>

#include <ATen/ATen.h>

#include <spdlog/fmt/ranges.h>
#include <spdlog/spdlog.h>

#include "data/atomic_file.h"
#include "data/binidx.h"
#include "data/content_hash.h"
#include "data/mapped_file.h"
#include "data/tokenizer_registry.h"
#include "model/formats/format_registry.h"
#include "model/state_file.h"
#include "model/version_shapes.h"
#include "model/weights.h"
#include "train/checkpoint.h"
#include "train/config_value.h"
#include "train/gpu.h"
#include "train/model_sizes.h"
#include "train/model_tokenizer.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

// Refuses a corpus made by a tokenizer other than the one the run names.
void check_tokenizer(const BinidxFile& corpus,
                     const std::string& spec,
                     const std::string& identity) {
  const auto& record = corpus.tokenizer_record();
  if (record && record->identity != identity) {
    throw std::invalid_argument("data.tokenizer = \"" + spec + "\" is " + identity + ", but " +
                                corpus.prefix() + ".bin was made with " + record->identity +
                                "; tokenize the text again or name the tokenizer it was made with");
  }
}

void check_same_tokenizer(const BinidxFile& train, const BinidxFile& validation) {
  const auto& x = train.tokenizer_record();
  const auto& y = validation.tokenizer_record();
  if (x && y && x->identity != y->identity) {
    throw std::invalid_argument("data.validation = \"" + validation.prefix() + "\" was made with " +
                                y->identity + ", but data.train = \"" + train.prefix() +
                                "\" with " + x->identity + "; tokenize both with one tokenizer");
  }
}

void resolve_sizes(RunConfig& config) {
  if (!config.init.from) {
    return;
  }
  // Once there is a checkpoint the file that the run began with is not needed, and may be gone.
  const auto checkpoint = newest_whole_checkpoint(config.train.run_dir, Scrutiny::kSizes).path;
  if (checkpoint) {
    confirm_sizes(config, read_saved_run(*checkpoint).config.model, *checkpoint);
  } else {
    const std::string path = find_model(*config.init.from);
    confirm_sizes(config, config_of(read_weights(path)), path);
  }
}

LoadRules rules_of(const InitConfig& init) {
  const auto new_rows = init.vocab_growth == VocabGrowth::kMean   ? LoadRules::NewRows::kMean
                        : init.vocab_growth == VocabGrowth::kZero ? LoadRules::NewRows::kZero
                                                                  : LoadRules::NewRows::kRefused;
  return {.may_be_missing = init.allow_missing,
          .may_be_unexpected = init.allow_unexpected,
          .new_rows = new_rows};
}

// Refuses a pattern that allows what does not occur: it is a slip of the pen, or of the file.
void require_use(const std::vector<std::string>& patterns,
                 const std::vector<std::string>& names,
                 const std::string& key,
                 const std::string& what) {
  for (const std::string& pattern : patterns) {
    const bool used = std::any_of(names.begin(), names.end(), [&](const std::string& name) {
      return matches_any({pattern}, name);
    });
    if (!used) {
      throw std::invalid_argument(key + ": no tensor that matches \"" + pattern + "\" is " + what +
                                  "; leave the pattern out");
    }
  }
}

}  // namespace

RunConfig resolve_run_config(RunConfig config) {
  config.validate();
  resolve_sizes(config);
  const BinidxFile corpus(config.data.train);
  resolve_vocab_size(config.model, corpus);
  if (config.data.tokenizer) {
    const std::string identity = open_tokenizer(*config.data.tokenizer)->identity();
    check_tokenizer(corpus, *config.data.tokenizer, identity);
  }
  // A grown vocabulary is another tokenizer's.
  if (config.init.from && config.init.vocab_growth == VocabGrowth::kRefuse &&
      !newest_checkpoint(config.train.run_dir)) {
    require_tokenizer_of(read_weights(find_model(*config.init.from)), corpus);
  }
  if (config.data.validation) {
    check_same_tokenizer(corpus, BinidxFile(*config.data.validation));
  }
  find_version_shapes(config.model.version).resolve(config.model);
  config.model.validate();
  if (config.train.device != "cpu") {
    if (const std::string reason = why_no_kernels(config.model); !reason.empty()) {
      reject_value("train.device", to_config_text(std::string_view(config.train.device)), reason);
    }
  }
  return config;
}

void set_initial_weights(RwkvModel& model, const RunConfig& config) {
  model->initialise(static_cast<uint64_t>(config.train.seed), config.schedule.lr_init);
  if (!config.init.from) {
    return;
  }
  const std::string path = find_model(*config.init.from, Scrutiny::kWeights);
  const WeightFile file = read_weights(path);
  const LoadReport report = load_weights(model, file, rules_of(config.init));
  require_use(
      config.init.allow_missing, report.missing, "init.allow_missing", "missing in " + path);
  require_use(config.init.allow_unexpected,
              report.left_out,
              "init.allow_unexpected",
              "unexpected in " + path);
  spdlog::info("beginning with the weights of {}", path);
  if (const auto trained_as = config_in(file);
      trained_as && trained_as->init.state && !config.init.state) {
    spdlog::warn(
        "the weights were trained with every sequence beginning from the state in {}; here each "
        "begins from nothing, unless init.state names it",
        *trained_as->init.state);
  }
  if (!report.missing.empty()) {
    spdlog::info("with initial values: {}", fmt::join(report.missing, ", "));
  }
  if (!report.left_out.empty()) {
    spdlog::info("left out: {}", fmt::join(report.left_out, ", "));
  }
  if (report.new_rows > 0) {
    spdlog::info(
        "emb.weight and head.weight get {} new rows: {}",
        report.new_rows,
        config.init.vocab_growth == VocabGrowth::kMean ? "the mean of the others" : "zero");
  }
}

std::string set_initial_state(RwkvModel& model, const InitConfig& init) {
  if (!init.state) {
    return "";
  }
  model->set_initial_state(load_state(*init.state, model));
  return content_hash(MappedFile(*init.state).bytes());
}

void freeze_parameters(RwkvModel& model, const std::vector<std::string>& patterns) {
  for (const std::string& pattern : patterns) {
    bool matched = false;
    for (auto& item : model->named_parameters()) {
      if (matches_any({pattern}, item.key())) {
        item.value().set_requires_grad(false);
        matched = true;
      }
    }
    if (!matched) {
      throw std::invalid_argument("optimizer.freeze: no tensor of the model matches \"" + pattern +
                                  "\"; they are named as in parameters.txt of a run, such as "
                                  "blocks.0.att.key.weight");
    }
  }
  if (count_trained(model) == 0) {
    throw std::invalid_argument("optimizer.freeze leaves no tensor to train; freeze fewer");
  }
}

int64_t count_trained(RwkvModel model) {
  int64_t count = 0;
  for (const at::Tensor& parameter : model->parameters()) {
    count += parameter.requires_grad() ? parameter.numel() : 0;
  }
  return count;
}

std::string describe_parameters(RwkvModel model, const OptimizerConfig& config) {
  std::ostringstream text;
  text << std::left << std::setw(32) << "tensor" << std::right << std::setw(20) << "shape"
       << std::setw(14) << "parameters"
       << "  training\n";
  for (const auto& item : model->named_parameters()) {
    const at::Tensor& parameter = item.value();
    const ParameterTraits traits = model->traits(item.key(), parameter.sizes());
    std::ostringstream shape;
    shape << parameter.sizes();
    text << std::left << std::setw(32) << item.key() << std::right << std::setw(20) << shape.str()
         << std::setw(14) << parameter.numel() << "  ";
    if (!parameter.requires_grad()) {
      text << "frozen\n";
      continue;
    }
    text << "rate x " << (config.layerwise_lr ? traits.lr_scale : 1.0)
         << (traits.weight_decay && config.weight_decay > 0 ? ", decay" : "") << '\n';
  }
  text << count_trained(model) << " of " << model->num_parameters() << " parameters are trained\n";
  return text.str();
}

}  // namespace rwkv
