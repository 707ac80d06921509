// What a run is before its first step: the configuration with all that follows from it, and the
// model with the weights it begins with.
#pragma once

#include <string>

#include "model/rwkv_model.h"
#include "train/run_config.h"

namespace rwkv {

// Fills in what a configuration leaves to init.from (version and sizes; once the run has a
// checkpoint, to that), to the corpus (vocab_size, from the tokenizer record) and to the model's
// version (dim_att, dim_ffn). Throws std::invalid_argument or std::runtime_error naming both sides
// where weights, corpus, tokenizer and configuration contradict each other.
RunConfig resolve_run_config(RunConfig config);

// Gives a new model its first values: those of its version, then those of init.from over them, and
// logs what came from where. Throws std::runtime_error naming the file and a tensor that does not
// fit; std::invalid_argument naming a pattern of [init] that nothing needed.
void set_initial_weights(RwkvModel& model, const RunConfig& config);

// Has every sequence start from init.state, if it is given, and names the file's content
// (data/content_hash.h); empty without one. Throws as load_state() does.
std::string set_initial_state(RwkvModel& model, const InitConfig& init);

// Marks the parameters that match a pattern as not trained (requires_grad false). Throws
// std::invalid_argument if a pattern matches none, or if nothing is left to train.
void freeze_parameters(RwkvModel& model, const std::vector<std::string>& patterns);

// Every parameter on a line: name, shape, count, and whether and how fast it is trained.
std::string describe_parameters(RwkvModel model, const OptimizerConfig& config);
// Elements of the parameters that are trained.
int64_t count_trained(RwkvModel model);

}  // namespace rwkv
