#include "train/bench/bench.h"

#include <chrono>
#include <filesystem>
#include <iostream>
#include <stdexcept>

#include <ATen/Parallel.h>

#include "data/atomic_file.h"
#include "data/tokenizer_registry.h"
#include "train/bench/bench_distributed.h"
#include "train/bench/bench_model.h"
#include "train/bench/bench_ops.h"
#include "train/bench/bench_save.h"
#include "train/bench/bench_startup.h"
#include "train/bench/bench_tokenizer.h"
#include "train/commands/commands.h"
#include "train/commands/launch.h"
#include "train/commands/model_options.h"
#include "train/machine.h"

namespace rwkv {
namespace {

using cxxopts::ParseResult;
using cxxopts::value;

int64_t positive(const ParseResult& parsed, const std::string& name) {
  const auto number = parsed[name].as<int64_t>();
  if (number < 1) {
    throw std::invalid_argument("--" + name + " " + std::to_string(number) + ": must be 1 or more");
  }
  return number;
}

void override_if_given(const ParseResult& parsed, const std::string& name, int64_t& number) {
  if (parsed.count(name) > 0) {
    number = positive(parsed, name);
  }
}

void add_shape_options(cxxopts::OptionAdder& add, const std::string& shape = "both") {
  add("shape",
      "S (L6 D384 V256 B8 T256), M (L12 D768 V50277 B4 T128) or both; L12 (M's model, B16 T1024) "
      "or L24 (D2048 V50277 B8 T1024), which ask for a GPU",
      value<std::string>()->default_value(shape));
  add("version", "of the model", value<std::string>()->default_value("rwkv4"));
  add("n-layer", "instead of the shape's", value<int64_t>());
  add("n-embd", "instead of the shape's", value<int64_t>());
  add("vocab", "vocabulary size, instead of the shape's", value<int64_t>());
}

void add_batch_options(cxxopts::OptionAdder& add) {
  add("batch", "sequences a step, instead of the shape's", value<int64_t>());
  add("ctx-len", "tokens a sequence, instead of the shape's", value<int64_t>());
}

void add_micro_batches_option(cxxopts::OptionAdder& add) {
  add("micro-batches",
      "of that many sequences each in a step",
      value<int64_t>()->default_value("1"));
}

void add_repeat_options(cxxopts::OptionAdder& add, const std::string& repeats) {
  add("repeats", "timings after the warm-up", value<int64_t>()->default_value(repeats));
  add("json",
      "write the figures as JSON to this file; - prints them instead of the table",
      value<std::string>());
}

void add_run_options(cxxopts::OptionAdder& add, const std::string& repeats) {
  add("dtype", "fp32, bf16 or both", value<std::string>()->default_value("both"));
  add("threads", "default: one a core", value<int64_t>());
  add_repeat_options(add, repeats);
}

struct NamedShape {
  std::string name;
  bool in_both;
  StepShape shape;
};

// S is trained in minutes on a laptop; M is the smallest released RWKV-4. L12 is M with the batch
// that fills a GPU, and L24 the 1.5B model.
std::vector<StepShape> shapes_of(const ParseResult& parsed) {
  const NamedShape named[] = {
      {"S", true, {{.n_layer = 6, .n_embd = 384, .vocab_size = 256, .ctx_len = 256}, 8}},
      {"M", true, {{.n_layer = 12, .n_embd = 768, .vocab_size = 50277, .ctx_len = 128}, 4}},
      {"L12", false, {{.n_layer = 12, .n_embd = 768, .vocab_size = 50277, .ctx_len = 1024}, 16}},
      {"L24", false, {{.n_layer = 24, .n_embd = 2048, .vocab_size = 50277, .ctx_len = 1024}, 8}}};
  const std::string name = parsed["shape"].as<std::string>();
  std::vector<StepShape> shapes;
  for (const NamedShape& candidate : named) {
    if (name == candidate.name || (name == "both" && candidate.in_both)) {
      shapes.push_back(candidate.shape);
    }
  }
  if (shapes.empty()) {
    throw std::invalid_argument("--shape " + name + ": expected S, M, both, L12 or L24");
  }
  for (StepShape& shape : shapes) {
    shape.model.version = parsed["version"].as<std::string>();
    override_if_given(parsed, "n-layer", shape.model.n_layer);
    override_if_given(parsed, "n-embd", shape.model.n_embd);
    override_if_given(parsed, "vocab", shape.model.vocab_size);
  }
  return shapes;
}

// With the options of add_batch_options.
std::vector<StepShape> shapes_with_batch(const ParseResult& parsed) {
  std::vector<StepShape> shapes = shapes_of(parsed);
  for (StepShape& shape : shapes) {
    override_if_given(parsed, "batch", shape.batch_size);
    override_if_given(parsed, "ctx-len", shape.model.ctx_len);
  }
  return shapes;
}

void add_recompute_option(cxxopts::OptionAdder& add) {
  add("recompute",
      "in backward: none, mixes or blocks (train.recompute)",
      value<std::string>()->default_value("none"));
}

Recompute recompute_of(const ParseResult& parsed) {
  const std::string name = parsed["recompute"].as<std::string>();
  if (name != "none" && name != "mixes" && name != "blocks") {
    throw std::invalid_argument("--recompute " + name + ": expected none, mixes or blocks");
  }
  return name == "none"    ? Recompute::kNone
         : name == "mixes" ? Recompute::kMixes
                           : Recompute::kBlocks;
}

std::vector<at::ScalarType> dtypes_of(const ParseResult& parsed) {
  const std::string name = parsed["dtype"].as<std::string>();
  if (name == "both") {
    return {at::kFloat, at::kBFloat16};
  }
  return {parse_dtype(name) == ComputeDtype::kBf16 ? at::kBFloat16 : at::kFloat};
}

// Runs `rows_of` for every shape and dtype, each in a process of its own.
template <typename RowsOf>
std::vector<BenchRow> rows_of_all(const ParseResult& parsed,
                                  const std::vector<StepShape>& shapes,
                                  const RowsOf& rows_of) {
  std::vector<BenchRow> all;
  for (const StepShape& shape : shapes) {
    for (const at::ScalarType dtype : dtypes_of(parsed)) {
      const auto rows = in_own_process([&] {
        // Set in any case: LibTorch's own default follows OMP_NUM_THREADS.
        const int64_t threads =
            parsed.count("threads") > 0 ? positive(parsed, "threads") : describe_machine().cores;
        at::set_num_threads(static_cast<int>(threads));
        return rows_of(shape, dtype);
      });
      all.insert(all.end(), rows.begin(), rows.end());
    }
  }
  return all;
}

void report(const ParseResult& parsed, const std::vector<BenchRow>& rows) {
  const std::string path = parsed.count("json") > 0 ? parsed["json"].as<std::string>() : "";
  std::cout << (path == "-" ? rows_to_json(rows) : format_rows(rows));
  if (!path.empty() && path != "-") {
    AtomicFile file(path);
    file.write(rows_to_json(rows));
    file.commit();
  }
}

int bench_step_command(int argc, char** argv) {
  cxxopts::Options options("rookery bench step",
                           "Times a training step on random weights and tokens.\n");
  cxxopts::OptionAdder add = options.add_options();
  add_shape_options(add);
  add_batch_options(add);
  add_micro_batches_option(add);
  add("explain", "also the time of each kind of op, beside its floor");
  add_recompute_option(add);
  add("trace",
      "write a timeline of three steps to this file, for ui.perfetto.dev; of one shape and dtype",
      value<std::string>());
  add_device_option(add);
  add_run_options(add, "10");
  const auto parsed =
      parse_options(options, argc, argv, "rookery bench step --shape S --dtype bf16", {});
  if (!parsed) {
    return 0;
  }
  const std::vector<StepShape> shapes = shapes_with_batch(*parsed);
  const int64_t repeats = positive(*parsed, "repeats");
  const Recompute recompute = recompute_of(*parsed);
  const std::string trace = parsed->count("trace") > 0 ? (*parsed)["trace"].as<std::string>() : "";
  if (!trace.empty() && shapes.size() * dtypes_of(*parsed).size() != 1) {
    throw std::invalid_argument("--trace " + trace +
                                ": one file holds one step; give one --shape and one --dtype");
  }
  const StepDetail detail = parsed->count("explain") > 0 ? StepDetail::kByOp : StepDetail::kWhole;
  const int64_t micro_batches = positive(*parsed, "micro-batches");
  if (detail == StepDetail::kByOp && micro_batches > 1) {
    throw std::invalid_argument("--micro-batches " + std::to_string(micro_batches) +
                                " --explain: a step is explained with one; leave either out");
  }
  if (detail == StepDetail::kByOp && !has_step_model(shapes.front().model)) {
    throw std::invalid_argument("--version " + shapes.front().model.version +
                                " --explain: the floors of its ops are not known, only those of "
                                "rwkv4 and rwkv7; leave --explain out");
  }
  report(*parsed, rows_of_all(*parsed, shapes, [&](const StepShape& shape, at::ScalarType dtype) {
    return std::vector{bench_step(shape,
                                  dtype,
                                  {.repeats = repeats,
                                   .runtime = open_device_option(*parsed).runtime,
                                   .recompute = recompute,
                                   .micro_batches = micro_batches,
                                   .trace = trace},
                                  detail)};
  }));
  return 0;
}

int bench_decode_command(int argc, char** argv) {
  cxxopts::Options options("rookery bench decode",
                           "Times generation, one sequence at a time, on random weights.\n");
  cxxopts::OptionAdder add = options.add_options();
  add_shape_options(add);
  add("prompt-len", "tokens of the prefill", value<int64_t>()->default_value("512"));
  add_device_option(add);
  add_run_options(add, "64");
  const auto parsed = parse_options(options, argc, argv, "rookery bench decode --shape M", {});
  if (!parsed) {
    return 0;
  }
  const int64_t prompt_len = positive(*parsed, "prompt-len");
  const int64_t repeats = positive(*parsed, "repeats");
  report(
      *parsed,
      rows_of_all(*parsed, shapes_of(*parsed), [&](const StepShape& shape, at::ScalarType dtype) {
        return bench_decode(shape.model,
                            prompt_len,
                            dtype,
                            {.repeats = repeats,
                             .runtime = open_device_option(*parsed).runtime,
                             .recompute = Recompute::kNone});
      }));
  return 0;
}

int bench_ops_command(int argc, char** argv) {
  cxxopts::Options options("rookery bench ops",
                           "Times each of rookery's ops, forward and backward, at the sizes of a "
                           "training step, beside the same maths in LibTorch's own ops.\n");
  cxxopts::OptionAdder add = options.add_options();
  add_shape_options(add);
  add_batch_options(add);
  add_run_options(add, "15");
  const auto parsed = parse_options(options, argc, argv, "rookery bench ops --shape S", {});
  if (!parsed) {
    return 0;
  }
  const int64_t repeats = positive(*parsed, "repeats");
  report(
      *parsed,
      rows_of_all(
          *parsed, shapes_with_batch(*parsed), [&](const StepShape& shape, at::ScalarType dtype) {
            return bench_ops(shape, dtype, repeats);
          }));
  return 0;
}

int bench_tokenizer_command(int argc, char** argv) {
  cxxopts::Options options(
      "rookery bench tokenizer",
      "Times tokenizers on one thread.\n\nTokenizers:\n" + describe_tokenizer_specs());
  cxxopts::OptionAdder add = options.add_options();
  add("tokenizer",
      "see above; may be given several times; default: world and bytes",
      value<std::vector<std::string>>());
  add("text",
      "a .txt or .jsonl file, also .gz or .zst; may be given several times; default: a text of "
      "invented words, which real text only resembles",
      value<std::vector<std::string>>());
  add("megabytes", "of the invented text", value<int64_t>()->default_value("16"));
  add_repeat_options(add, "5");
  const auto parsed = parse_options(
      options, argc, argv, "rookery bench tokenizer --tokenizer world --text book.txt", {});
  if (!parsed) {
    return 0;
  }
  const int64_t repeats = positive(*parsed, "repeats");
  const int64_t invented_bytes = positive(*parsed, "megabytes") * 1'000'000;
  std::vector<std::string> documents;
  if (parsed->count("text") > 0) {
    TextReader reader((*parsed)["text"].as<std::vector<std::string>>(), {});
    documents = read_documents(reader);
  } else {
    documents = invented_documents(invented_bytes);
  }
  std::vector<std::string> specs{"world", "bytes"};
  if (parsed->count("tokenizer") > 0) {
    specs = (*parsed)["tokenizer"].as<std::vector<std::string>>();
  }
  std::vector<BenchRow> rows;
  for (const std::string& spec : specs) {
    rows.push_back(bench_tokenizer(spec, documents, repeats));
  }
  report(*parsed, rows);
  return 0;
}

int bench_save_command(int argc, char** argv) {
  cxxopts::Options options("rookery bench save",
                           "Times the saving of a checkpoint beside a plain file of as many bytes, "
                           "each until it is on the\ndisk.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("folder", "on the disk to be timed", value<std::string>()->default_value("."));
  add("megabytes", "of weights and moments", value<int64_t>()->default_value("1000"));
  add_repeat_options(add, "5");
  const auto parsed =
      parse_options(options, argc, argv, "rookery bench save --folder runs --megabytes 2000", {});
  if (!parsed) {
    return 0;
  }
  report(*parsed,
         bench_save((*parsed)["folder"].as<std::string>(),
                    positive(*parsed, "megabytes") * 1'000'000,
                    positive(*parsed, "repeats")));
  return 0;
}

int bench_startup_command(int argc, char** argv) {
  cxxopts::Options options("rookery bench startup",
                           "Times the program's start: of its help, and of training up to the end "
                           "of the first step.\n");
  cxxopts::OptionAdder add = options.add_options();
  add_repeat_options(add, "5");
  const auto parsed = parse_options(options, argc, argv, "rookery bench startup", {});
  if (!parsed) {
    return 0;
  }
  const std::string program = std::filesystem::read_symlink("/proc/self/exe").string();
  report(*parsed, bench_startup(program, positive(*parsed, "repeats")));
  return 0;
}

// One of the processes that a step is timed on.
std::vector<BenchRow> rows_of_rank(const Placement& placement,
                                   const ParseResult& parsed,
                                   const StepShape& shape,
                                   at::ScalarType dtype,
                                   int64_t zero_stage) {
  if (placement.world_size == 1) {
    throw std::invalid_argument(
        "rookery bench distributed: one process alone is compared with nothing; give --nproc 2");
  }
  const std::string device_name = device_of(device_of_ranks(parsed), placement);
  const OpenDevice device = open_device(device_name, "--device " + device_name);
  if (device.runtime == nullptr) {
    // Before the communicator starts threads.
    bind_to_own_core(placement);
  }
  const std::chrono::duration<double> timeout(DistributedConfig{}.timeout_s);
  Communicator communicator(
      placement, device, std::chrono::duration_cast<std::chrono::milliseconds>(timeout));
  return bench_distributed(communicator,
                           shape,
                           dtype,
                           {.repeats = positive(parsed, "repeats"),
                            .runtime = device.runtime,
                            .recompute = recompute_of(parsed),
                            .micro_batches = positive(parsed, "micro-batches")},
                           zero_stage);
}

int bench_distributed_command(int argc, char** argv, bool verbose) {
  cxxopts::Options options(
      "rookery bench distributed",
      "Times a training step of several processes beside that of one, in turns. On the CPU each\n"
      "process has one core, and all together the batch that one has alone; on GPUs each has a\n"
      "GPU, and a batch of its own. Starts two, unless it is started as ranks of rookery train\n"
      "are.\n");
  cxxopts::OptionAdder add = options.add_options();
  add_shape_options(add, "M");
  add_batch_options(add);
  add_micro_batches_option(add);
  add_recompute_option(add);
  add("dtype", "fp32 or bf16", value<std::string>()->default_value("fp32"));
  add("device", "cpu, or cuda: a GPU for each", value<std::string>()->default_value("cpu"));
  add("zero", "0, 1 or 2 (distributed.zero)", value<int64_t>()->default_value("1"));
  add_launcher_options(add);
  add_repeat_options(add, "5");
  const auto parsed = parse_options(
      options, argc, argv, "rookery bench distributed --nproc 2 --shape M --zero 1", {});
  if (!parsed) {
    return 0;
  }
  const std::vector<StepShape> shapes = shapes_with_batch(*parsed);
  if (shapes.size() != 1) {
    throw std::invalid_argument("--shape both: processes are timed with one at a time");
  }
  const at::ScalarType dtype =
      parse_dtype((*parsed)["dtype"].as<std::string>()) == ComputeDtype::kBf16 ? at::kBFloat16
                                                                               : at::kFloat;
  const auto zero_stage = (*parsed)["zero"].as<int64_t>();
  positive(*parsed, "micro-batches");
  if (zero_stage < 0 || zero_stage > 2) {
    throw std::invalid_argument("--zero " + std::to_string(zero_stage) + ": expected 0, 1 or 2");
  }
  const Placement placement = placement_from_environment();
  if (asks_for_launcher(*parsed) || placement.source.empty()) {
    LaunchPlan plan = plan_launch(*parsed, {"bench", "distributed"}, verbose, 2);
    plan.max_restarts = 0;
    if (device_of_ranks(*parsed) == "cpu") {
      require_core_each(plan.ranks_here);
    }
    return launch(plan).exit_code;
  }
  const auto rows = rows_of_rank(placement, *parsed, shapes.front(), dtype, zero_stage);
  if (placement.rank == 0) {
    report(*parsed, rows);
  }
  return 0;
}

struct Benchmark {
  std::string_view name;
  std::string_view summary;
  int (*run)(int argc, char** argv);
};

constexpr auto kStartsRanks = nullptr;
constexpr std::string_view kDistributed = "distributed";

constexpr Benchmark kBenchmarks[] = {
    {"step", "a training step", &bench_step_command},
    {"decode", "prefill and single tokens", &bench_decode_command},
    {"ops", "each op beside the same maths in LibTorch's ops", &bench_ops_command},
    {"tokenizer", "text to tokens", &bench_tokenizer_command},
    {"save", "a checkpoint, beside the disk", &bench_save_command},
    {kDistributed, "a training step of several processes beside that of one", kStartsRanks},
    {"startup", "from the command line to the first step", &bench_startup_command},
};

void print_help() {
  std::cout << "Times parts of rookery on this machine; where there is a floor, it is measured in "
               "the same\n"
            << "run.\n\n"
            << "Usage:\n  rookery bench WHAT [OPTION...]\n\nWHAT is one of\n";
  for (const Benchmark& benchmark : kBenchmarks) {
    std::cout << "  " << benchmark.name << std::string(12 - benchmark.name.size(), ' ')
              << benchmark.summary << '\n';
  }
  std::cout << "\nEach has --help. Example:\n  rookery bench step --shape S\n";
}

}  // namespace

int bench_command(int argc, char** argv, bool verbose) {
  const std::string_view name = argc > 1 ? argv[1] : "--help";
  if (name == "--help" || name == "-h") {
    print_help();
    return 0;
  }
  if (name == kDistributed) {
    return bench_distributed_command(argc - 1, argv + 1, verbose);
  }
  for (const Benchmark& benchmark : kBenchmarks) {
    if (benchmark.name == name) {
      return benchmark.run(argc - 1, argv + 1);
    }
  }
  throw std::invalid_argument("rookery bench: there is no benchmark \"" + std::string(name) +
                              "\"; rookery bench --help lists them");
}

}  // namespace rwkv
