// The commands of the program. Each declares its options, builds what it needs and runs; results go
// to stdout, the log to stderr. They return an exit code or throw (train/run_main.h).
//   argv[0] is the command's name as shown in its help, "rookery train".
#pragma once

#include <optional>
#include <string>
#include <vector>

// Paths may hold commas: an option that takes several values is given several times.
#define CXXOPTS_VECTOR_DELIMITER '\0'
#include <cxxopts.hpp>

namespace rwkv {

int tokenizer_command(int argc, char** argv);
int tokenize_command(int argc, char** argv);
int train_command(int argc, char** argv);
int eval_command(int argc, char** argv);
int generate_command(int argc, char** argv);
int logits_command(int argc, char** argv);
int convert_command(int argc, char** argv);
// With `verbose`, which it hands on to the ranks that it starts.
int bench_command(int argc, char** argv, bool verbose);
int report_command(int argc, char** argv);
int inspect_command(int argc, char** argv);
int doctor_command(int argc, char** argv);
// One rank of `rookery doctor --distributed`.
int doctor_links_command(int argc, char** argv);
int plan_command(int argc, char** argv);

// Parses; prints the help with its example and returns nothing if --help was given. Throws
// cxxopts' exceptions for unknown options, and std::invalid_argument naming a required one that is
// not there.
std::optional<cxxopts::ParseResult> parse_options(cxxopts::Options& options,
                                                  int argc,
                                                  char** argv,
                                                  const std::string& example,
                                                  const std::vector<std::string>& required);

// The value of a --dtype option: "fp32" or "bf16". Throws std::invalid_argument for another.
enum class ComputeDtype { kFp32, kBf16 };
ComputeDtype parse_dtype(const std::string& name);

}  // namespace rwkv
